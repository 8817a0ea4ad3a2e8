"""The counter stream: known answers, and words that depend on nothing but what is sampled."""

import math
import warnings

import pytest
import torch

import vgkern
from vgkern.ops import noise as noise_module
from vgkern.ops.noise import philox

# Random123 1.14, kat_vectors, philox4x32-10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def noise(sequence, position, seed=11):
    return vgkern.Noise(seed, torch.as_tensor(sequence), torch.as_tensor(position))


@pytest.mark.parametrize(("counter", "key", "known"), KNOWN)
def test_philox_known_answers(counter, key, known):
    got = philox(key[0] | key[1] << 32, tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in got) == known


def test_counter_layout():
    """counter = (vocab_id // 4, position, sequence low, sequence high), word = vocab_id % 4."""
    (c0, c1, c2, c3), (k0, k1), known = KNOWN[2]
    sequence = c2 | c3 << 32
    v = 4 * 5 + 2
    n = vgkern.Noise(k0 | k1 << 32, torch.tensor(sequence), torch.tensor(c1))
    word = philox(n.seed, tuple(torch.tensor(c) for c in (5, c1, c2, c3)))[2]
    assert int(n.words(v + 1)[v]) == int(word)
    assert known[0] == int(philox(n.seed, tuple(torch.tensor(c) for c in (c0, c1, c2, c3)))[0])


def test_words_are_independent_of_batch_order_and_vocabulary():
    s, p = torch.tensor([5, 2**40 + 1, 7]), torch.tensor([0, 3, 2**32 - 1])
    words = noise(s, p).words(1035)
    assert words.shape == (3, 1035)
    assert int(words.min()) >= 0 and int(words.max()) < 2**32
    order = torch.tensor([2, 0, 1])
    assert torch.equal(noise(s[order], p[order]).words(1035), words[order])
    for i in range(3):
        assert torch.equal(noise(s[i], p[i]).words(31), words[i, :31])


def test_broadcast():
    s, p = torch.tensor([[3], [9]]), torch.tensor([0, 1, 2])
    words = noise(s, p).words(6)
    assert words.shape == (2, 3, 6)
    assert torch.equal(words[1, 2], noise(9, 2).words(6))


def test_every_part_of_the_address_matters():
    base = noise(5, 6).words(64)
    for other in (
        noise(6, 6),
        noise(5, 7),
        noise(5 + 2**32, 6),
        noise(5, 6, 12),
        noise(5, 6, 2**63),
    ):
        assert not torch.equal(base, other.words(64))


def test_words_are_uniform():
    words = noise(torch.arange(50), 0).words(2000)
    for shift in (0, 8, 16, 24):
        seen = torch.bincount((words >> shift & 255).flatten(), minlength=256).double()
        chi2 = float(((seen - seen.mean()) ** 2 / seen.mean()).sum())
        assert chi2 < 255 + 4.5 * math.sqrt(2 * 255)  # fixed seed, about 1e-5


def test_gumbel_formula_and_tail(monkeypatch):
    """Word 0 is the largest Gumbel: far above the 16.6 where -log(-log(u)) in fp32 ends."""
    n = noise(0, 0)
    monkeypatch.setattr(
        vgkern.Noise, "words", lambda self, v: torch.tensor([0, 1, 2**31, 2**32 - 1])
    )
    g = n.gumbel(4)
    u = [(w + 0.5) * 2.0**-32 for w in (0, 1, 2**31)] + [1 - 2.0**-24]
    exact = torch.tensor([-math.log(-math.log1p(-x)) for x in u])
    assert float(g[0]) > 22.8
    assert g.isfinite().all()
    torch.testing.assert_close(g, exact, rtol=1e-6, atol=1e-6)


def test_gumbel_moments():
    g = noise(torch.arange(200), 1).gumbel(1000).double()
    assert abs(float(g.mean()) - 0.5772157) < 4 * math.pi / math.sqrt(6 * g.numel())
    assert abs(float(g.var()) - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize(
    ("seed", "sequence", "position", "error", "words"),
    [
        (-1, 0, 0, ValueError, ("noise.seed", "-1", "2**64")),
        (2**64, 0, 0, ValueError, ("noise.seed", "2**64")),
        (1.5, 0, 0, TypeError, ("noise.seed", "1.5", "int")),
        (0, -3, 0, ValueError, ("noise.sequence", "-3", "0 <= sequence")),
        (0, 0, 2**32, ValueError, ("noise.position", "4294967296", "2**32")),
        (0, 0.5, 0, TypeError, ("noise.sequence", "int64")),
        (0, 0, 0.5, TypeError, ("noise.position", "int64")),
    ],
)
def test_bad_address(seed, sequence, position, error, words):
    with pytest.raises(error) as e:
        vgkern.Noise(seed, torch.tensor(sequence), torch.tensor(position))
    assert all(w in str(e.value) for w in words), e.value


def test_the_signed_seed_has_the_same_bits():
    for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        signed = vgkern.Noise(seed, torch.tensor(0), torch.tensor(0)).signed_seed
        assert torch.tensor(signed).dtype == torch.int64 and signed % 2**64 == seed


def test_a_position_may_be_an_int():
    s = torch.arange(3)
    got = vgkern.Noise(1, s, 7)
    assert got.position.shape == () and got.position.dtype == torch.int64
    assert torch.equal(got.words(9), vgkern.Noise(1, s, torch.full((3,), 7)).words(9))
    for bad, error in ((-1, ValueError), (2**32, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match=r"noise\.position"):
            vgkern.Noise(0, s, bad)


def test_a_position_is_read_at_each_call():
    """A 0-d tensor that the caller counts up in place, as a captured decode step does."""
    at = torch.tensor(0)
    n = vgkern.Noise(1, torch.arange(3), at)
    h, w = torch.ones(3, 2), torch.zeros(1000, 2)
    first = vgkern.linear_sample(h, w, n, backend="torch").token
    at += 1
    second = vgkern.linear_sample(h, w, n, backend="torch").token
    assert not torch.equal(first, second)
    fixed = vgkern.linear_sample(h, w, vgkern.Noise(1, torch.arange(3), 1), backend="torch").token
    assert torch.equal(second, fixed)


def test_a_number_on_the_host_becomes_a_fill_on_the_device():
    """No copy from pageable memory, which a CUDA graph cannot hold."""
    device = torch.device("meta")
    s, p = vgkern.Noise(1, torch.arange(4, device=device), 5).rows(torch.Size([4]), device)
    assert s.device == p.device == device and p.shape == (4,) and p.dtype == torch.int64


def test_the_same_address_twice_is_said_once(monkeypatch):
    monkeypatch.setattr(noise_module, "_said", set())
    h, w = torch.ones(4, 2), torch.zeros(1000, 2)

    def draw(s, p):
        return vgkern.linear_sample(h, w, vgkern.Noise(1, torch.tensor(s), p), backend="torch")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw([0, 1, 2, 3], 0)
        draw([3, 2, 0, 1], 0)
        draw([5, 5, 2, 2], torch.tensor([0, 1, 0, 1]))
    with pytest.warns(UserWarning, match=r"rows 1 and 3 .*sequence 7, position 2.*1 of 4"):
        token = draw([3, 7, 0, 7], 2).token
    assert token[1] == token[3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw([3, 7, 0, 7], 2)
