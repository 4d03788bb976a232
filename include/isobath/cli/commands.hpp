#pragma once
#include <isobath/cli/arguments.hpp>
#include <isobath/comm/communicator.hpp>

namespace isobath::cli {

/// Carries out one command. Collective over `world`; `check`, `inspect` and `version` are rank 0's work
/// alone. Throws what the command throws; AgreedFailure (config) when the configuration is not valid.
void execute(const Arguments& arguments, const comm::Communicator& world);

}  // namespace isobath::cli
