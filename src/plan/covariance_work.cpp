#include <isobath/plan/work.hpp>

namespace isobath::plan {
namespace {

// Channels of a panel of kernels/gram.cpp.
constexpr double kGramPanel = 48;

// The next shard's zeros; one sum added to another; the lower triangle from the upper one.
constexpr double kZerosTraffic = 4, kAddTraffic = 12, kMirrorTraffic = 8;
// What a kernel packs, in elements of the activations: it reads them and writes two panels.
constexpr double kPackedElements = 3;

}  // namespace

double panel_width(double d) {
  return d <= 1024 ? 128 : 256;
}

Work covariance_add(const Shapes& s, double n_rows, double d) {
  if (s.has_gram)
    return {.covariance_flops = n_rows * d * (d + kGramPanel),
            .traffic_bytes = n_rows * d * kPackedElements * s.element_bytes,
            .n_operations = 4};
  // to f32 e+4, times √D 8, mask 8, finite? 8.
  return {.f32_flops = n_rows * d * (d + panel_width(d)),
          .traffic_bytes = n_rows * d * (s.element_bytes + 28),
          .n_operations = 8 + d / panel_width(d)};
}

Work covariance_shards(double d, double n_shards) {
  return {.traffic_bytes = n_shards * kZerosTraffic * d * d,
          .n_operations = 2 * n_shards,
          .host_link_bytes = 4 * d * d,
          .host_traffic_bytes = (n_shards - 1) * kAddTraffic * d * d};
}

Work covariance_sum(const Shapes& s, double n_rows, double d, double n_shards, bool in_panels) {
  // In panels: the upper triangle alone. For every six of them the rows are read and weighted again, up to
  // the last one's channels; kernels pack them twice, to find values that may not be used first.
  constexpr double kPanelsPerPass = 6;  // pipeline/panel_factor.hpp
  const double share = in_panels ? panel_entries(d) / (d * d) : 1;
  const double passes = in_panels ? std::ceil(d / (kPanelsPerPass * panel_columns())) : 1;
  const double readings = in_panels ? (passes + 1) / (s.has_gram ? 1 : 2) : 1;
  const Work product = covariance_add(s, n_rows, d);
  return product + Work{.traffic_bytes = (readings - 1) * product.traffic_bytes} +
         share * covariance_shards(d, n_shards);
}

Work covariance_mirror(double d) {
  return {.host_traffic_bytes = kMirrorTraffic * d * d};
}

Work cross_covariance_add(const Shapes& s, double n_rows, double d) {
  const double e = s.element_bytes;
  // Both inputs to f32 e+4, difference 12, times D 8, two masks 12, finite? 8; to bf16 4+e each for the
  // kernel, which packs both.
  const double bytes = 2 * (e + 4) + 40 + (s.has_gram && e < 4 ? 2 * (4 + e) : 0) +
                       (s.has_gram ? 2 * kPackedElements * e : 0),
               flops = 2 * n_rows * d * d;
  return {.f32_flops = s.has_gram ? 0 : flops,
          .covariance_flops = s.has_gram ? flops : 0,
          .traffic_bytes = n_rows * d * bytes,
          .n_operations = 12};
}

Work trace_pass(const Shapes& s, double n_rows, double d) {
  // To f32 e+4, square 8, sum 4.
  return {.traffic_bytes = n_rows * d * (s.element_bytes + 16), .n_operations = 6};
}

}  // namespace isobath::plan
