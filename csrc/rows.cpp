// Chooses the row kernels that this CPU can run; VGKERN_ISA=base|v3|v4 forces one (tests).
#include "rows.h"

#include <cstdlib>
#include <cstring>

#include "gemm.h"

namespace vgkern {

extern const RowKernels rows_base;
extern const GemmKernels gemm_base;
#ifdef VG_HAVE_V3
extern const RowKernels rows_v3;
#endif
#ifdef VG_HAVE_V4
extern const RowKernels rows_v4;
extern const GemmKernels gemm_v4;
#endif

static const RowKernels& choose() {
  const char* want = std::getenv("VGKERN_ISA");
  auto open = [&](const char* isa) { return !want || !*want || !std::strcmp(want, isa); };
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef VG_HAVE_V4
  if (open("v4") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
    return rows_v4;
#endif
#ifdef VG_HAVE_V3
  if (open("v3") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return rows_v3;
#endif
#endif
  (void)open;
  return rows_base;
}

const RowKernels& rows() {
  static const RowKernels& table = choose();
  return table;
}

static GemmKernels choose_gemm() {
#if defined(__x86_64__) && defined(VG_HAVE_V4)
  if (&rows() == &rows_v4) {
    GemmKernels k = gemm_v4;
    // Half the rate of fp32 on Intel (measured on Emerald Rapids), twice the rate on AMD (Zen 4).
    k.bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
    const char* want = std::getenv("VGKERN_BF16");  // "widen" keeps to fp32 (tests)
    if (want && !std::strcmp(want, "widen")) k.bf16 = false;
    return k;
  }
#endif
  return gemm_base;
}

const GemmKernels& gemm() {
  static const GemmKernels table = choose_gemm();
  return table;
}

}  // namespace vgkern
