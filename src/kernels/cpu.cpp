#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>

namespace isobath::kernels {
namespace {

enum class Level { aten, avx2, avx512, amx };

Level allowed_level() {
  const char* name = std::getenv("ISOBATH_KERNELS");
  if (name == nullptr || std::string_view(name) == "amx") return Level::amx;
  if (std::string_view(name) == "avx512") return Level::avx512;
  if (std::string_view(name) == "avx2") return Level::avx2;
  if (std::string_view(name) == "aten") return Level::aten;
  fail<ConfigError>(
      "ISOBATH_KERNELS={}: expected aten, avx2, avx512 or amx; unset it for the best of this machine", name);
}

#if defined(__x86_64__)
bool cpu_has_amx_bf16() {
  constexpr unsigned kLeaf = 7, kBf16 = 1U << 22, kTile = 1U << 24;  // bits of EDX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(kLeaf, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0;
}

/// Linux saves tile registers only for processes that asked (5.16 and later); others would die of SIGILL.
bool linux_grants_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

bool has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool has = [] {
    if (allowed_level() < Level::avx512) return false;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }();
  return has;
#else
  return false;
#endif
}

bool has_amx() {
#if defined(__x86_64__)
  static const bool has =
      allowed_level() >= Level::amx && has_avx512_bf16() && cpu_has_amx_bf16() && linux_grants_tiles();
  return has;
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  static const bool has = [] {
    if (allowed_level() < Level::avx2) return false;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }();
  return has;
#else
  return false;
#endif
}

std::string_view implementation_of(c10::ScalarType dtype) {
  if (dtype == c10::ScalarType::BFloat16 && has_avx512_bf16()) return has_amx() ? "amx" : "avx512";
  if (dtype == c10::ScalarType::Float && has_avx2()) return "avx2";
  return "aten";
}

}  // namespace isobath::kernels
