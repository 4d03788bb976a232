#include <cstdlib>
#include <isobath/kernels/cpu.hpp>
#include <string_view>

namespace isobath::kernels {

bool has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool has = [] {
    const char* off = std::getenv("ISOBATH_NO_AVX512_BF16");
    if (off != nullptr && std::string_view(off) == "1") return false;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace isobath::kernels
