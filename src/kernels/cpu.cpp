#include <cstdlib>
#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>

namespace isobath::kernels {
namespace {

enum class Level { aten, avx2, avx512 };

Level allowed_level() {
  const char* name = std::getenv("ISOBATH_KERNELS");
  if (name == nullptr || std::string_view(name) == "avx512") return Level::avx512;
  if (std::string_view(name) == "avx2") return Level::avx2;
  if (std::string_view(name) == "aten") return Level::aten;
  fail<ConfigError>(
      "ISOBATH_KERNELS={}: expected aten, avx2 or avx512; unset it for the best of this machine", name);
}

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
  if (dtype == c10::ScalarType::BFloat16 && has_avx512_bf16()) return "avx512";
  if (dtype == c10::ScalarType::Float && has_avx2()) return "avx2";
  return "aten";
}

}  // namespace isobath::kernels
