#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/pipeline/original.hpp>
#include <isobath/quant/factor.hpp>
#include <vector>

/// One H too wide for one rank: summed, factorized and used panel by panel, the panels dealt to the ranks in
/// turn. Every panel sees the same operations on the same shapes in the same order whoever owns it, so the
/// bits do not depend on the number of ranks.
namespace isobath::pipeline {

/// Who owns which columns of a matrix.
struct PanelLayout {
  std::vector<Range> columns;  ///< of each panel
  int first_owner = 0;         ///< of panel 0
  int n_ranks = 1;
  int64_t n_residual = 0;  ///< rows of C below those of the input's channels: channels of the residual stream
  bool is_spread = true;   ///< the next panel belongs to the next rank; else all to the first owner

  [[nodiscard]] int owner(size_t panel) const {
    if (!is_spread) return first_owner;
    return static_cast<int>((static_cast<size_t>(first_owner) + panel) % static_cast<size_t>(n_ranks));
  }
};

/// Takes rows of X [n, C], those of the original model (undefined where nobody asks for them), and their
/// token weights [n], or undefined (D = 1).
using VisitRows =
    std::function<void(const at::Tensor& x, const Original& original, const at::Tensor& weights)>;
/// Calls the first for each batch of this rank's rows in order, and the second after the last one of each
/// logical shard.
using ForEachRows = std::function<void(const VisitRows&, const std::function<void(int64_t shard)>&)>;

/// Panels of H = XᵀDX over all ranks' rows, f32, each on its owner; undefined elsewhere. Passes over the rows
/// once for every kPanelsPerPass panels, the widest first, when nothing else is held yet.
///
/// Memory   4 bytes for each of this rank's entries, and kPanelsPerPass panels for each level of the tree.
/// Throws   NumericError on the owner of a panel that is not finite.
/// Collective over `comm`, the communicator that shard_owners are ranks of.
[[nodiscard]] std::vector<at::Tensor> sum_panels(const PanelLayout& layout,
                                                 const std::vector<int>& shard_owners,
                                                 const comm::Communicator& comm, c10::Device device,
                                                 const ForEachRows& for_each_rows);

/// The same of C, whose panels have all C rows, and n_residual more.
[[nodiscard]] std::vector<at::Tensor> sum_cross_panels(const PanelLayout& layout,
                                                       const std::vector<int>& shard_owners,
                                                       const comm::Communicator& comm, c10::Device device,
                                                       const ForEachRows& for_each_rows);

/// Panels that one pass over the rows sums.
inline constexpr size_t kPanelsPerPass = 6;

/// The diagonal of H [C] f64 from its panels. Collective.
[[nodiscard]] at::Tensor share_diagonal(const std::vector<at::Tensor>& panels, const PanelLayout& layout,
                                        const comm::Communicator& comm);

/// Factorizes H + λI for the factor's λ, from the last panel to the first: its owner factorizes a panel, all
/// ranks receive it and subtract its share from their own. Takes the f32 panels, which become f64 in place of
/// them and in the end the factor's own f32 panels: on the devices, where there are some. False on every
/// rank, panels spoilt, when H + λI is not positive definite.
///
/// Memory   8 bytes for each of this rank's entries, and two f64 panels; of the device.
/// Cost     C³/6 multiply-adds over all ranks.
/// Network  each panel to all ranks, f64: 4 C² bytes in all.
/// Collective over the devices' ranks.
[[nodiscard]] bool factorize_panels(std::vector<at::Tensor> panels, const PanelLayout& layout,
                                    quant::Factor& factor, const comm::DeviceCommunicator& devices);

/// A panel of the factor on every rank, on its device. Collective, as those below.
[[nodiscard]] at::Tensor share_panel(const quant::Factor& factor, const PanelLayout& layout, size_t panel,
                                     const comm::DeviceCommunicator& devices);

/// Columns of C on every rank's device, [C + n_residual, width] f32 from the owner.
[[nodiscard]] at::Tensor share_cross_panel(const at::Tensor& own, const PanelLayout& layout, size_t panel,
                                           const comm::DeviceCommunicator& devices);

/// quant::slab_rows on every rank; panels that all ranks have are not sent.
[[nodiscard]] at::Tensor share_slab(const quant::Factor& factor, const PanelLayout& layout, Range columns,
                                    bool is_everywhere, const comm::DeviceCommunicator& devices);

}  // namespace isobath::pipeline
