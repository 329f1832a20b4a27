// Which of the compiled instruction sets this processor can run.
#include "kernels/kernels.h"

namespace avx512_amx { extern const gossamer::Kernels kernels; }
namespace avx512_vbmi2 { extern const gossamer::Kernels kernels; }
namespace avx512_vnni { extern const gossamer::Kernels kernels; }
namespace avx512 { extern const gossamer::Kernels kernels; }
namespace avx2 { extern const gossamer::Kernels kernels; }
namespace avx512_emulated { extern const gossamer::Kernels kernels; }
namespace amx_emulated { extern const gossamer::Kernels kernels; }
namespace neon_dot { extern const gossamer::Kernels kernels; }
namespace portable { extern const gossamer::Kernels kernels; }

#if defined(GOSSAMER_HAS_neon_dot)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

#if defined(GOSSAMER_HAS_avx512_amx) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether tiles of bytes and of bf16 are there, and Linux lets this process use them: it wants to be asked first, once, for all threads
// (https://docs.kernel.org/arch/x86/xstate.html).
static bool tiles_here() {
  unsigned a, b, c, d;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (AMX_BF16 | AMX_TILE | AMX_INT8)) return false;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
[[maybe_unused]] static bool tiles_here() { return false; }
#endif

namespace gossamer {

const Kernels* const* available() {
  static const Kernels* list[9];  // null beyond what is found
  static const bool filled = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2_here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512_here = avx2_here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni_here = avx512_here && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(GOSSAMER_HAS_avx512_amx)
    if (vnni_here && __builtin_cpu_supports("avx512vbmi2") && tiles_here()) list[n++] = &avx512_amx::kernels;
#endif
#if defined(GOSSAMER_HAS_avx512_vbmi2)
    if (vnni_here && __builtin_cpu_supports("avx512vbmi2")) list[n++] = &avx512_vbmi2::kernels;
#endif
#if defined(GOSSAMER_HAS_avx512_vnni)
    if (vnni_here) list[n++] = &avx512_vnni::kernels;
#endif
#if defined(GOSSAMER_HAS_avx512)
    if (avx512_here) list[n++] = &avx512::kernels;
#endif
#if defined(GOSSAMER_HAS_avx2)
    if (avx2_here) list[n++] = &avx2::kernels;
#endif
#if defined(GOSSAMER_HAS_avx512_emulated)
    if (avx2_here) list[n++] = &avx512_emulated::kernels;
#endif
#if defined(GOSSAMER_HAS_amx_emulated)
    if (avx2_here) list[n++] = &amx_emulated::kernels;
#endif
#if defined(GOSSAMER_HAS_neon_dot)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) list[n++] = &neon_dot::kernels;
#endif
#if defined(GOSSAMER_HAS_portable)
    list[n++] = &portable::kernels;
#endif
    return true;
  }();
  (void)filled;
  return list;
}

}  // namespace gossamer
