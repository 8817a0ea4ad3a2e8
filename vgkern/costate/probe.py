"""Costate norms per layer and position, read while the backward pass goes by.

    with vgkern.costate.probe(model) as p:
        loss = ...          # the forward pass belongs inside: it is where the hooks attach
        loss.backward()
    p.result().norms        # [layers + 1, B, T]: |d loss / d x_l| at every position

x_0 is the residual stream entering the first block, x_l the one leaving block l. Every gradient is
reduced where autograd has it in its hands and then left to it, so no [T, H] is kept for any layer,
and gradients are what they are without the probe, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgkern.ops import _check

Each = Callable[[int, Tensor], None]  # layer, costate [B, T, H]; may not keep the tensor


class ProbeResult(NamedTuple):
    """One forward and backward pass.

    norms: fp32 [layers + 1, B, T], in units of the loss per unit of the residual stream. NaN in a
        layer that autograd did not pass (frozen weights below it), 0 where nothing arrives.
    layers: a name for each of the layers + 1.
    """

    norms: Tensor
    layers: tuple[str, ...]


class _Pass:
    """What one forward pass has got back so far. `place`: see `Probe.spread`."""

    def __init__(self, layers: int, place: Any) -> None:
        self.rows: list[Tensor | None] = [None] * layers
        self.place = place
        self.seen: set[int] = set()  # layers whose forward ran


def probe(
    model: nn.Module, *, layers: Sequence[nn.Module] | None = None, each: Each | None = None
) -> Probe:
    """Reads the costates of every backward pass whose forward pass ran inside `with probe(...)`.

    model: a Hugging Face causal LM (wrapped or not), this package's decoder, or anything with one
        outermost `nn.ModuleList` of blocks that map [B, T, H] to [B, T, H].
    layers: the blocks, in order, where they are not found or not all are wanted.
    each: called as each(layer, costate [B, T, H]) during the backward pass, for a reduction of
        your own. Keep what it makes of the tensor, not the tensor.

    Several passes (micro-batches) give several `results()`. Packed models (prefix trees) give the
    layout that their blocks see. Gradient checkpointing (use_reentrant=False)
    changes nothing.

    Raises ValueError naming `model` or `layers` where the blocks cannot be told, and inside a
    forward pass that runs a block twice.
    """
    return Probe(model, layers, each)


class Probe:
    """Made by `probe`; also usable as `start()` ... `stop()` where a `with` does not fit."""

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module] | None, each: Each | None
    ) -> None:
        self.model = _holder(model)
        self.each = each
        self.points: list[tuple[nn.Module, bool]]  # module; is it the input that is wanted?
        if layers is None and hasattr(self.model, "probe_points"):
            outputs = list(self.model.probe_points())
            self.points = [(module, False) for module in outputs]
        else:
            blocks = _blocks(model) if layers is None else _given(layers)
            self.points = [(blocks[0], True), *((block, False) for block in blocks)]
        outputs = [module for module, entering in self.points if not entering]
        if len(set(outputs)) < len(outputs):
            raise _check.fail("layers", "one module twice", "blocks that a forward pass runs once")
        self.owner = _owner(model, outputs)
        self.running = 0  # passes begun in the owner's forward so far; 0 outside of it
        self.inside = False
        names = {module: name for name, module in model.named_modules()}
        first = "input of " if self.points[0][1] else ""
        self.names = tuple(names.get(module, type(module).__name__) for module, _ in self.points)
        self.names = (first + self.names[0], *self.names[1:])
        self.passes: list[_Pass] = []
        self.place: Any = None  # of the forward pass that has begun
        self.handles: list[Any] = []

    def start(self) -> Probe:
        if self.handles:
            raise ValueError("probe: got a second start; allowed: one `with` at a time")
        self.passes = []
        place = getattr(self.model, "probe_place", None)
        if place is not None:
            hook = lambda _, args: setattr(self, "place", place(*args))  # noqa: E731
            self.handles.append(self.model.register_forward_pre_hook(hook))
        self.inside = False
        self.handles.append(self.owner.register_forward_pre_hook(lambda *_: self._enter(True)))
        self.handles.append(self.owner.register_forward_hook(lambda *_: self._enter(False)))
        for layer, (module, entering) in enumerate(self.points):
            if entering:
                made: Any = module.register_forward_pre_hook(
                    self._entering(layer), with_kwargs=True
                )
            else:
                made = module.register_forward_hook(self._leaving(layer))
            self.handles.append(made)
        return self

    def stop(self) -> None:
        """Removes every hook, those on tensors of a graph that still lives included."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.place = [], None

    def __enter__(self) -> Probe:
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def spread(self, rows: Tensor) -> Tensor:
        """Rows of the latest forward pass, in the model's own layout, as [B, T, ...]."""
        return _spread(rows, self.passes[-1].place if self.passes else None)

    def results(self) -> list[ProbeResult]:
        """One for each pass whose backward ran, in the order of their forward passes."""
        found = []
        for run in self.passes:
            known = [rows for rows in run.rows if rows is not None]
            if not known:
                continue
            like = _spread(known[0], run.place)
            none = torch.full_like(like, torch.nan)
            norms = [none if rows is None else _spread(rows, run.place) for rows in run.rows]
            found.append(ProbeResult(torch.stack(norms), self.names))
        return found

    def result(self) -> ProbeResult:
        """The one pass there was. Raises ValueError where there was none, or more than one."""
        found = self.results()
        if len(found) == 1:
            return found[0]
        got = f"{len(self.passes)} forward and {len(found)} backward passes"
        remedy = "one of each inside `with probe(...)`; for more of them use results()"
        raise _check.fail("probe", got, remedy)

    def _enter(self, inside: bool) -> None:
        self.inside, self.running = inside, 0

    def _entering(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._watch(layer, _stream([*args, *kwargs.values()]))

        return hook

    def _leaving(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            tuples = isinstance(output, tuple | list)
            self._watch(layer, _stream(output if tuples else [output]))

        return hook

    def _watch(self, layer: int, x: Tensor | None) -> None:
        # run again inside a backward pass (gradient checkpointing): what it makes gets no gradient
        recomputed = torch._C._current_graph_task_id() != -1
        if recomputed or not torch.is_grad_enabled():
            return
        if layer == 0:
            self.running += 1
            if not self.inside or self.running == 1:
                self.passes.append(_Pass(len(self.points), self.place))
        if self.passes:
            if layer in self.passes[-1].seen:
                name = self.names[layer].removeprefix("input of ")
                allowed = "blocks that run once; else say which with layers=[...]"
                raise _check.fail("model", f"block {name}, run twice in one forward pass", allowed)
            self.passes[-1].seen.add(layer)
        if x is None or not x.requires_grad or not self.passes:
            return
        run, each = self.passes[-1], self.each

        def arrived(costate: Tensor) -> None:
            wide = torch.float64 if costate.dtype == torch.float64 else torch.float32
            with torch.no_grad():
                run.rows[layer] = torch.linalg.vector_norm(costate, dim=-1, dtype=wide).float()
                if each is not None:
                    each(layer, _spread(costate.detach(), run.place))

        self.handles.append(x.register_hook(arrived))


def _owner(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """The innermost module whose forward runs all the blocks."""
    found = model
    for module in model.modules():  # an outer one comes before what is in it
        if not isinstance(module, nn.ModuleList) and set(blocks) <= set(module.modules()):
            found = module
    return found


def _spread(rows: Tensor, place: Any) -> Tensor:
    """Rows as [B, T, ...]. A packed model's are its last ones (the others reach no loss)."""
    if place is None:
        return rows
    (count, width), slot = place
    out = rows.new_zeros(count * width, *rows.shape[1:])
    out[slot[len(slot) - len(rows) :]] = rows
    return out.view(count, width, *rows.shape[1:])


def _stream(values: Sequence[Any]) -> Tensor | None:
    """The hidden states: the first floating-point tensor."""
    return next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)


def _holder(model: nn.Module) -> Any:
    """The module that knows its own points, whatever wraps it; else the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {_check.describe(model)}; allowed: an nn.Module")
    return next((m for m in model.modules() if hasattr(m, "probe_points")), model)


def _given(layers: Sequence[nn.Module]) -> list[nn.Module]:
    blocks = list(layers)
    if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
        raise _check.fail("layers", f"{blocks!r:.80}", "the model's blocks, one nn.Module or more")
    return blocks


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The one outermost ModuleList, or the one as long as the configuration says."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    inside = [n for n in lists for outer in lists if n.startswith(f"{outer}.")]
    lists = {n: m for n, m in lists.items() if n not in inside}
    if len(lists) > 1:
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        depth = getattr(config, "num_hidden_layers", None)
        lists = {n: m for n, m in lists.items() if len(m) == depth} or lists
    if len(lists) != 1:
        got = f"{type(model).__name__} with {list(lists) or 'no nn.ModuleList'}"
        raise _check.fail("model", got, "one list of blocks; else say which with layers=[...]")
    return list(next(iter(lists.values())))
