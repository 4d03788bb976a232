#pragma once
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace isobath::io {

struct SafetensorsDtype {
  std::string_view name;
  std::optional<at::ScalarType> dtype;  ///< absent: valid in the format, not supported here
};

/// In the order of the format's reference implementation, by which its writer lays tensors out (last first).
inline constexpr std::array<SafetensorsDtype, 22> kSafetensorsDtypes{{
    {"BOOL", at::kBool},
    {"F4", {}},
    {"F6_E2M3", {}},
    {"F6_E3M2", {}},
    {"U8", at::kByte},
    {"I8", at::kChar},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E8M0", {}},
    {"F8_E4M3FNUZ", {}},
    {"F8_E5M2FNUZ", {}},
    {"I16", at::kShort},
    {"U16", at::kUInt16},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I32", at::kInt},
    {"U32", at::kUInt32},
    {"F32", at::kFloat},
    {"C64", {}},
    {"F64", at::kDouble},
    {"I64", at::kLong},
    {"U64", at::kUInt64},
}};

inline constexpr std::string_view kMetadataKey = "__metadata__";
inline constexpr int64_t kMaxHeaderBytes = 100'000'000;
inline constexpr int64_t kMaxTensors = 200'000;
inline constexpr size_t kMaxNameBytes = 1024;
/// ATen's iterators keep one bit per dimension in 64.
inline constexpr size_t kMaxDimensions = 64;

/// The rule that a tensor name breaks, empty when it is fine.
[[nodiscard]] std::string_view name_fault(std::string_view name);

/// A name from a file, safe to print: quoted, control and non-ASCII characters escaped, cut at 100
/// characters.
[[nodiscard]] std::string printable(std::string_view name);

}  // namespace isobath::io
