#pragma once
#include <isobath/comm/communicator.hpp>

namespace isobath::testing {

/// All ranks of this test program. Valid from the first test to the last.
[[nodiscard]] const comm::Communicator& world();

}  // namespace isobath::testing
