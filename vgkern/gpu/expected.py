"""What every run must have measured: phase | op | backend | dtype | metric.

Written by `benchmarks/gpu.py names DIR` from a dry run.
"""

EXPECTED = """
facts | machine |  |  | gpu
facts | machine |  |  | memory_GiB
facts | machine |  |  | driver
facts | machine |  |  | python
facts | machine |  |  | cores
facts | machine |  |  | cuda
facts | machine |  |  | nvcc
facts | version |  |  | torch
facts | version |  |  | triton
facts | version |  |  | numpy
facts | version |  |  | transformers
facts | version |  |  | pytest
facts | version |  |  | pytest-xdist
facts | version |  |  | hypothesis
facts | version |  |  | trl
facts | version |  |  | liger-kernel
facts | version |  |  | cut-cross-entropy
facts | ceiling |  |  | TB/s
facts | ceiling |  | bf16 | TFLOP/s
facts | ceiling |  | fp16 | TFLOP/s
facts | ceiling |  | fp32 | TFLOP/s
facts | GEMM tf32 |  | fp32 | TFLOP/s
facts | GEMM logits |  | bf16 | TFLOP/s
facts | GEMM dh |  | bf16 | TFLOP/s
facts | GEMM dW |  | bf16 | TFLOP/s
facts | GEMM dW added |  | bf16 | TFLOP/s
build | library | cpu |  | seconds
build | library | cuda |  | seconds
build | triton | triton |  | compiled
build | triton |  |  | called
build | triton |  |  | slowest_worker_s
smoke | torch.empty |  |  | is_nan
smoke | token_logprobs | triton | fp32 | error_ratio
smoke | token_logprobs | triton | bf16 | error_ratio
smoke | token_logprobs | triton | fp16 | error_ratio
smoke | token_logprobs | cuda | fp32 | error_ratio
smoke | token_logprobs | cuda | bf16 | error_ratio
smoke | token_logprobs | cuda | fp16 | error_ratio
smoke | linear_token_logprobs | triton | fp32 | error_ratio
smoke | linear_token_logprobs | triton | bf16 | error_ratio
smoke | linear_token_logprobs | triton | fp16 | error_ratio
smoke | linear_token_logprobs | cuda | fp32 | error_ratio
smoke | linear_token_logprobs | cuda | bf16 | error_ratio
smoke | linear_token_logprobs | cuda | fp16 | error_ratio
smoke | group_advantages | triton | fp32 | error_ratio
smoke | group_advantages | triton | bf16 | error_ratio
smoke | group_advantages | cuda | fp32 | error_ratio
smoke | group_advantages | cuda | bf16 | error_ratio
smoke | policy_loss | triton | fp32 | error_ratio
smoke | policy_loss | cuda | fp32 | error_ratio
smoke | linear_policy_loss | triton | fp32 | error_ratio
smoke | linear_policy_loss | triton | bf16 | error_ratio
smoke | linear_policy_loss | triton | fp16 | error_ratio
smoke | linear_policy_loss | cuda | fp32 | error_ratio
smoke | linear_policy_loss | cuda | bf16 | error_ratio
smoke | linear_policy_loss | cuda | fp16 | error_ratio
smoke | linear_sample | triton | fp32 | error_ratio
smoke | linear_sample | triton | bf16 | error_ratio
smoke | linear_sample | triton | fp16 | error_ratio
smoke | linear_sample | cuda | fp32 | error_ratio
smoke | linear_sample | cuda | bf16 | error_ratio
smoke | linear_sample | cuda | fp16 | error_ratio
smoke | noisy_embedding | triton | fp32 | error_ratio
smoke | noisy_embedding | triton | bf16 | error_ratio
smoke | noisy_embedding | triton | fp16 | error_ratio
smoke | noisy_embedding | cuda | fp32 | error_ratio
smoke | noisy_embedding | cuda | bf16 | error_ratio
smoke | noisy_embedding | cuda | fp16 | error_ratio
smoke | linear_divergence | triton | fp32 | error_ratio
smoke | linear_divergence | triton | bf16 | error_ratio
smoke | linear_divergence | triton | fp16 | error_ratio
smoke | gaussian_action | triton | fp32 | error_ratio
smoke | gaussian_action | triton | bf16 | error_ratio
smoke | gaussian_action | triton | fp16 | error_ratio
smoke | gaussian_action | cuda | fp32 | error_ratio
smoke | gaussian_action | cuda | bf16 | error_ratio
smoke | gaussian_action | cuda | fp16 | error_ratio
smoke | costate_scan | triton | fp32 | error_ratio
smoke | costate_scan | triton | bf16 | error_ratio
smoke | costate_scan | triton | fp16 | error_ratio
smoke | costate_scan | cuda | fp32 | error_ratio
smoke | costate_scan | cuda | bf16 | error_ratio
smoke | costate_scan | cuda | fp16 | error_ratio
smoke | linear_rollout | triton | fp32 | error_ratio
smoke | linear_rollout | triton | bf16 | error_ratio
smoke | linear_rollout | triton | fp16 | error_ratio
smoke | linear_rollout | cuda | fp32 | error_ratio
smoke | linear_rollout | cuda | bf16 | error_ratio
smoke | linear_rollout | cuda | fp16 | error_ratio
smoke | linear_token_logprobs | triton | bf16 | error_ratio_chunks
smoke | linear_token_logprobs | cuda | bf16 | error_ratio_chunks
smoke | linear_policy_loss | triton | bf16 | error_ratio_chunks
smoke | linear_policy_loss | cuda | bf16 | error_ratio_chunks
smoke | linear_sample | triton | bf16 | error_ratio_chunks
smoke | linear_sample | cuda | bf16 | error_ratio_chunks
smoke | noisy_embedding | triton | bf16 | error_ratio_chunks
smoke | noisy_embedding | cuda | bf16 | error_ratio_chunks
smoke | linear_divergence | triton | bf16 | error_ratio_chunks
smoke | token_logprobs | triton |  | waits
smoke | token_logprobs | cuda |  | waits
smoke | linear_token_logprobs | triton |  | waits
smoke | linear_token_logprobs | cuda |  | waits
smoke | group_advantages | triton |  | waits
smoke | group_advantages | cuda |  | waits
smoke | policy_loss | triton |  | waits
smoke | policy_loss | cuda |  | waits
smoke | linear_policy_loss | triton |  | waits
smoke | linear_policy_loss | cuda |  | waits
smoke | linear_sample | triton |  | waits
smoke | linear_sample | cuda |  | waits
smoke | noisy_embedding | triton |  | waits
smoke | noisy_embedding | cuda |  | waits
smoke | linear_divergence | triton |  | waits
smoke | gaussian_action | triton |  | waits
smoke | gaussian_action | cuda |  | waits
smoke | costate_scan | triton |  | waits
smoke | costate_scan | cuda |  | waits
smoke | linear_rollout | triton |  | waits
smoke | linear_rollout | cuda |  | waits
smoke | token_logprobs | triton | bf16 | nan_stays
smoke | token_logprobs | triton | bf16 | stray_id_stays
smoke | token_logprobs | cuda | bf16 | nan_stays
smoke | token_logprobs | cuda | bf16 | stray_id_stays
smoke | linear_token_logprobs | triton | bf16 | nan_stays
smoke | linear_token_logprobs | triton | bf16 | stray_id_stays
smoke | linear_token_logprobs | cuda | bf16 | nan_stays
smoke | linear_token_logprobs | cuda | bf16 | stray_id_stays
smoke | linear_policy_loss | triton | bf16 | nan_stays
smoke | linear_policy_loss | triton | bf16 | stray_id_stays
smoke | linear_policy_loss | cuda | bf16 | nan_stays
smoke | linear_policy_loss | cuda | bf16 | stray_id_stays
smoke | linear_sample | triton | bf16 | nan_stays
smoke | linear_sample | cuda | bf16 | nan_stays
smoke | noisy_embedding | triton | bf16 | nan_stays
smoke | noisy_embedding | cuda | bf16 | nan_stays
smoke | linear_divergence | triton | bf16 | nan_stays
smoke | linear_policy_loss | triton | bf16 | error_large
smoke | linear_policy_loss | cuda | bf16 | error_large
tokens | linear_sample | triton | fp32 | repeat_bits
tokens | linear_sample | triton | fp32 | permuted_bits
tokens | linear_token_logprobs | triton | fp32 | repeat_bits
tokens | linear_token_logprobs | triton | fp32 | permuted_bits
tokens | linear_policy_loss | triton | fp32 | repeat_bits
tokens | linear_policy_loss | triton | fp32 | permuted_bits
tokens | linear_sample | triton | bf16 | repeat_bits
tokens | linear_sample | triton | bf16 | permuted_bits
tokens | linear_token_logprobs | triton | bf16 | repeat_bits
tokens | linear_token_logprobs | triton | bf16 | permuted_bits
tokens | linear_policy_loss | triton | bf16 | repeat_bits
tokens | linear_policy_loss | triton | bf16 | permuted_bits
tokens | linear_sample | cuda | fp32 | repeat_bits
tokens | linear_sample | cuda | fp32 | permuted_bits
tokens | linear_token_logprobs | cuda | fp32 | repeat_bits
tokens | linear_token_logprobs | cuda | fp32 | permuted_bits
tokens | linear_policy_loss | cuda | fp32 | repeat_bits
tokens | linear_policy_loss | cuda | fp32 | permuted_bits
tokens | linear_sample | cuda | bf16 | repeat_bits
tokens | linear_sample | cuda | bf16 | permuted_bits
tokens | linear_token_logprobs | cuda | bf16 | repeat_bits
tokens | linear_token_logprobs | cuda | bf16 | permuted_bits
tokens | linear_policy_loss | cuda | bf16 | repeat_bits
tokens | linear_policy_loss | cuda | bf16 | permuted_bits
tokens | linear_sample | cpu | fp32 | differ_plain
tokens | linear_sample | triton | fp32 | differ_plain
tokens | linear_sample | cuda | fp32 | differ_plain
tokens | linear_sample | torch | fp32 | differ_plain
tokens | linear_sample | cpu | fp32 | differ_greedy
tokens | linear_sample | triton | fp32 | differ_greedy
tokens | linear_sample | cuda | fp32 | differ_greedy
tokens | linear_sample | torch | fp32 | differ_greedy
tokens | linear_sample | cpu | fp32 | differ_cut
tokens | linear_sample | triton | fp32 | differ_cut
tokens | linear_sample | cuda | fp32 | differ_cut
tokens | linear_sample | torch | fp32 | differ_cut
tokens | linear_sample | cpu | bf16 | differ_plain
tokens | linear_sample | triton | bf16 | differ_plain
tokens | linear_sample | cuda | bf16 | differ_plain
tokens | linear_sample | torch | bf16 | differ_plain
tokens | linear_sample | cpu | bf16 | differ_greedy
tokens | linear_sample | triton | bf16 | differ_greedy
tokens | linear_sample | cuda | bf16 | differ_greedy
tokens | linear_sample | torch | bf16 | differ_greedy
tokens | linear_sample | cpu | bf16 | differ_cut
tokens | linear_sample | triton | bf16 | differ_cut
tokens | linear_sample | cuda | bf16 | differ_cut
tokens | linear_sample | torch | bf16 | differ_cut
timing | linear_policy_loss | 3 gemms | bf16 | ms
timing | linear_policy_loss | 3 gemms | bf16 | device_ms
timing | linear_policy_loss | triton | bf16 | ms
timing | linear_policy_loss | triton | bf16 | device_ms
timing | linear_policy_loss | cuda | bf16 | ms
timing | linear_policy_loss | cuda | bf16 | device_ms
timing | linear_policy_loss | eager | bf16 | ms
timing | linear_policy_loss | eager | bf16 | device_ms
timing | linear_policy_loss frozen | 2 gemms | bf16 | ms
timing | linear_policy_loss frozen | 2 gemms | bf16 | device_ms
timing | linear_policy_loss frozen | triton | bf16 | ms
timing | linear_policy_loss frozen | triton | bf16 | device_ms
timing | linear_policy_loss frozen | cuda | bf16 | ms
timing | linear_policy_loss frozen | cuda | bf16 | device_ms
timing | linear_policy_loss frozen | eager | bf16 | ms
timing | linear_policy_loss frozen | eager | bf16 | device_ms
timing | linear_policy_loss | triton | bf16 | peak_MiB
timing | linear_policy_loss | cuda | bf16 | peak_MiB
timing | linear_policy_loss | eager | bf16 | peak_MiB
timing | linear_policy_loss | triton | bf16 | launches
timing | linear_policy_loss | cuda | bf16 | launches
timing | loss part | logits GEMM, fp32 out | bf16 | ms
timing | loss part | logits GEMM, fp32 out | bf16 | device_ms
timing | loss part | logits GEMM, bf16 out | bf16 | ms
timing | loss part | logits GEMM, bf16 out | bf16 | device_ms
timing | loss part | dh GEMM, fp32 out | bf16 | ms
timing | loss part | dh GEMM, fp32 out | bf16 | device_ms
timing | loss part | dW GEMM, fp32 out | bf16 | ms
timing | loss part | dW GEMM, fp32 out | bf16 | device_ms
timing | loss part | dW GEMM, added (beta 1) | bf16 | ms
timing | loss part | dW GEMM, added (beta 1) | bf16 | device_ms
timing | loss part | dW add_ alone | bf16 | ms
timing | loss part | dW add_ alone | bf16 | device_ms
timing | loss part | dW rounding | bf16 | ms
timing | loss part | dW rounding | bf16 | device_ms
timing | loss part | triton stats | bf16 | ms
timing | loss part | triton stats | bf16 | device_ms
timing | loss part | triton grad | bf16 | ms
timing | loss part | triton grad | bf16 | device_ms
timing | loss part | cuda stats | bf16 | ms
timing | loss part | cuda stats | bf16 | device_ms
timing | loss part | cuda grad | bf16 | ms
timing | loss part | cuda grad | bf16 | device_ms
timing | linear_token_logprobs fwd | gemm | bf16 | ms
timing | linear_token_logprobs fwd | gemm | bf16 | device_ms
timing | linear_token_logprobs fwd | triton | bf16 | ms
timing | linear_token_logprobs fwd | triton | bf16 | device_ms
timing | linear_token_logprobs fwd | cuda | bf16 | ms
timing | linear_token_logprobs fwd | cuda | bf16 | device_ms
timing | linear_token_logprobs fwd | eager | bf16 | ms
timing | linear_token_logprobs fwd | eager | bf16 | device_ms
timing | linear_token_logprobs fwd+bwd | triton | bf16 | ms
timing | linear_token_logprobs fwd+bwd | triton | bf16 | device_ms
timing | linear_token_logprobs fwd+bwd | cuda | bf16 | ms
timing | linear_token_logprobs fwd+bwd | cuda | bf16 | device_ms
timing | linear_token_logprobs fwd+bwd | eager | bf16 | ms
timing | linear_token_logprobs fwd+bwd | eager | bf16 | device_ms
timing | linear_sample | gemm | bf16 | ms
timing | linear_sample | gemm | bf16 | device_ms
timing | linear_sample | eager | bf16 | ms
timing | linear_sample | eager | bf16 | device_ms
timing | linear_sample | triton | bf16 | ms
timing | linear_sample | triton | bf16 | device_ms
timing | linear_sample | cuda | bf16 | ms
timing | linear_sample | cuda | bf16 | device_ms
timing | linear_sample | triton top_p | bf16 | ms
timing | linear_sample | triton top_p | bf16 | device_ms
timing | linear_sample | cuda top_p | bf16 | ms
timing | linear_sample | cuda top_p | bf16 | device_ms
timing | linear_sample | gemm graph | bf16 | ms
timing | linear_sample | gemm graph | bf16 | device_ms
timing | linear_sample | triton graph | bf16 | ms
timing | linear_sample | triton graph | bf16 | device_ms
timing | linear_sample | cuda graph | bf16 | ms
timing | linear_sample | cuda graph | bf16 | device_ms
timing | row_stats | logsumexp | fp32 | ms
timing | row_stats | logsumexp | fp32 | device_ms
timing | row_stats | logsumexp | fp32 | GB/s
timing | row_stats | triton | fp32 | ms
timing | row_stats | triton | fp32 | device_ms
timing | row_stats | triton | fp32 | GB/s
timing | row_stats | cuda | fp32 | ms
timing | row_stats | cuda | fp32 | device_ms
timing | row_stats | cuda | fp32 | GB/s
timing | row_grad | copy | fp32 | ms
timing | row_grad | copy | fp32 | device_ms
timing | row_grad | copy | fp32 | GB/s
timing | row_grad | triton | fp32 | ms
timing | row_grad | triton | fp32 | device_ms
timing | row_grad | triton | fp32 | GB/s
timing | row_grad | cuda | fp32 | ms
timing | row_grad | cuda | fp32 | device_ms
timing | row_grad | cuda | fp32 | GB/s
timing | row_stats | logsumexp | bf16 | ms
timing | row_stats | logsumexp | bf16 | device_ms
timing | row_stats | logsumexp | bf16 | GB/s
timing | row_stats | triton | bf16 | ms
timing | row_stats | triton | bf16 | device_ms
timing | row_stats | triton | bf16 | GB/s
timing | row_stats | cuda | bf16 | ms
timing | row_stats | cuda | bf16 | device_ms
timing | row_stats | cuda | bf16 | GB/s
timing | row_grad | copy | bf16 | ms
timing | row_grad | copy | bf16 | device_ms
timing | row_grad | copy | bf16 | GB/s
timing | row_grad | triton | bf16 | ms
timing | row_grad | triton | bf16 | device_ms
timing | row_grad | triton | bf16 | GB/s
timing | row_grad | cuda | bf16 | ms
timing | row_grad | cuda | bf16 | device_ms
timing | row_grad | cuda | bf16 | GB/s
timing | policy_loss | triton | fp32 | ms
timing | policy_loss | triton | fp32 | device_ms
timing | policy_loss | cuda | fp32 | ms
timing | policy_loss | cuda | fp32 | device_ms
timing | policy_loss | torch | fp32 | ms
timing | policy_loss | torch | fp32 | device_ms
timing | group_advantages | triton | fp32 | ms
timing | group_advantages | triton | fp32 | device_ms
timing | group_advantages | cuda | fp32 | ms
timing | group_advantages | cuda | fp32 | device_ms
timing | group_advantages | torch | fp32 | ms
timing | group_advantages | torch | fp32 | device_ms
timing | costate_scan | triton | fp32 | ms
timing | costate_scan | triton | fp32 | device_ms
timing | costate_scan | cuda | fp32 | ms
timing | costate_scan | cuda | fp32 | device_ms
timing | gaussian_action | triton | fp32 | ms
timing | gaussian_action | triton | fp32 | device_ms
timing | gaussian_action | cuda | fp32 | ms
timing | gaussian_action | cuda | fp32 | device_ms
timing | gaussian_action | torch | fp32 | ms
timing | gaussian_action | torch | fp32 | device_ms
timing | linear_policy_loss others | TRL | bf16 | ms
timing | linear_policy_loss others | TRL | bf16 | device_ms
timing | linear_policy_loss others | Liger | bf16 | ms
timing | linear_policy_loss others | Liger | bf16 | device_ms
timing | linear_policy_loss others | cut-cross-entropy | bf16 | ms
timing | linear_policy_loss others | cut-cross-entropy | bf16 | device_ms
timing | linear_policy_loss others | triton | bf16 | ms
timing | linear_policy_loss others | triton | bf16 | device_ms
timing | linear_policy_loss others | compile | bf16 | ms
timing | linear_policy_loss others | compile | bf16 | device_ms
timing | linear_policy_loss others | linear_cross_entropy | bf16 | ms
timing | linear_policy_loss others | linear_cross_entropy | bf16 | device_ms
graphs | token_logprobs | triton | fp32 | graph
graphs | token_logprobs | triton | fp32 | side_stream
graphs | token_logprobs | cuda | fp32 | graph
graphs | token_logprobs | cuda | fp32 | side_stream
graphs | linear_token_logprobs | triton | fp32 | graph
graphs | linear_token_logprobs | triton | fp32 | side_stream
graphs | linear_token_logprobs | cuda | fp32 | graph
graphs | linear_token_logprobs | cuda | fp32 | side_stream
graphs | group_advantages | triton | fp32 | graph
graphs | group_advantages | triton | fp32 | side_stream
graphs | group_advantages | cuda | fp32 | graph
graphs | group_advantages | cuda | fp32 | side_stream
graphs | policy_loss | triton | fp32 | graph
graphs | policy_loss | triton | fp32 | side_stream
graphs | policy_loss | cuda | fp32 | graph
graphs | policy_loss | cuda | fp32 | side_stream
graphs | linear_policy_loss | triton | fp32 | graph
graphs | linear_policy_loss | triton | fp32 | side_stream
graphs | linear_policy_loss | cuda | fp32 | graph
graphs | linear_policy_loss | cuda | fp32 | side_stream
graphs | linear_sample | triton | fp32 | graph
graphs | linear_sample | triton | fp32 | side_stream
graphs | linear_sample | cuda | fp32 | graph
graphs | linear_sample | cuda | fp32 | side_stream
graphs | noisy_embedding | triton | fp32 | graph
graphs | noisy_embedding | triton | fp32 | side_stream
graphs | noisy_embedding | cuda | fp32 | graph
graphs | noisy_embedding | cuda | fp32 | side_stream
graphs | linear_divergence | triton | fp32 | graph
graphs | linear_divergence | triton | fp32 | side_stream
graphs | gaussian_action | triton | fp32 | graph
graphs | gaussian_action | triton | fp32 | side_stream
graphs | gaussian_action | cuda | fp32 | graph
graphs | gaussian_action | cuda | fp32 | side_stream
graphs | costate_scan | triton | fp32 | graph
graphs | costate_scan | triton | fp32 | side_stream
graphs | costate_scan | cuda | fp32 | graph
graphs | costate_scan | cuda | fp32 | side_stream
graphs | linear_rollout | triton | fp32 | graph
graphs | linear_rollout | triton | fp32 | side_stream
graphs | linear_rollout | cuda | fp32 | graph
graphs | linear_rollout | cuda | fp32 | side_stream
graphs | linear_policy_loss | triton | fp32 | autocast
graphs | linear_policy_loss | triton | fp32 | autocast_mixed
graphs | linear_policy_loss | triton | fp32 | reduce_overhead
graphs | linear_token_logprobs | triton | fp32 | high_precision_sum
graphs | linear_sample | triton | fp32 | high_precision_gap
graphs | token_logprobs | triton | bf16 | beyond_2^31
graphs | linear_policy_loss | cuda | fp32 | autocast
graphs | linear_policy_loss | cuda | fp32 | autocast_mixed
graphs | linear_policy_loss | cuda | fp32 | reduce_overhead
graphs | linear_token_logprobs | cuda | fp32 | high_precision_sum
graphs | linear_sample | cuda | fp32 | high_precision_gap
graphs | token_logprobs | cuda | bf16 | beyond_2^31
graphs | token_logprobs | triton | fp32 | fullgraph
graphs | token_logprobs | cuda | fp32 | fullgraph
graphs | linear_token_logprobs | triton | fp32 | fullgraph
graphs | linear_token_logprobs | cuda | fp32 | fullgraph
graphs | group_advantages | triton | fp32 | fullgraph
graphs | group_advantages | cuda | fp32 | fullgraph
graphs | policy_loss | triton | fp32 | fullgraph
graphs | policy_loss | cuda | fp32 | fullgraph
graphs | linear_policy_loss | triton | fp32 | fullgraph
graphs | linear_policy_loss | cuda | fp32 | fullgraph
graphs | linear_sample | triton | fp32 | fullgraph
graphs | linear_sample | cuda | fp32 | fullgraph
graphs | noisy_embedding | triton | fp32 | fullgraph
graphs | noisy_embedding | cuda | fp32 | fullgraph
graphs | linear_divergence | triton | fp32 | fullgraph
graphs | gaussian_action | triton | fp32 | fullgraph
graphs | gaussian_action | cuda | fp32 | fullgraph
graphs | costate_scan | triton | fp32 | fullgraph
graphs | costate_scan | cuda | fp32 | fullgraph
graphs | linear_rollout | triton | fp32 | fullgraph
graphs | linear_rollout | cuda | fp32 | fullgraph
parity | pytest |  |  | failed
parity | pytest |  |  | skipped
parity | pytest |  |  | passed
train | train |  |  | steps
profile | linear_policy_loss | triton | bf16 | device_ms
profile | linear_policy_loss | cuda | bf16 | device_ms
"""
