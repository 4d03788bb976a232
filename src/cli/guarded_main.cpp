#include <isobath/cli/guarded_main.hpp>

#include <isobath/cli/arguments.hpp>
#include <isobath/cli/commands.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>

namespace isobath::cli {
namespace {

/// Whether the exception, or what it is nested in, was raised on every rank.
bool is_shared(const std::exception& error) {
  if (dynamic_cast<const AgreedFailure*>(&error) != nullptr ||
      dynamic_cast<const StopRequested*>(&error) != nullptr)
    return true;
  try {
    std::rethrow_if_nested(error);
  } catch (const std::exception& inner) {
    return is_shared(inner);
  } catch (...) {
    return false;
  }
  return false;
}

int end_with(const Ending& ending, const comm::Runtime& runtime) {
  const comm::Communicator& world = runtime.world();
  if (ending.is_shared) {
    if (world.rank() == 0)
      log::write(ending.code == ExitCode::stopped ? log::Level::warning : log::Level::error, ending.message);
    return static_cast<int>(ending.code);
  }
  if (world.size() == 1) {
    log::error("{}", ending.message);
    return static_cast<int>(ending.code);
  }
  log::error("[rank {}/{} {}] {}", world.rank(), world.size(), world.host(), ending.message);
  // The others may be waiting for this rank: finalizing would hang them.
  runtime.abort(ending.code);
}

}  // namespace

Ending ending_of(const std::exception& error) {
  return {is_shared(error), exit_code_of(error), describe(error)};
}

int guarded_main(int argc, char** argv, const comm::Runtime& runtime) {
  const comm::Communicator& world = runtime.world();
  log::configure(world.rank(), world.size(), log::Level::info);
  try {
    const auto parsed = parse_arguments(argc, argv);
    if (const auto* usage = std::get_if<Usage>(&parsed)) {
      if (usage->code == ExitCode::ok)
        log::print(usage->text);
      else if (world.rank() == 0)
        log::error("{}", usage->text);
      return static_cast<int>(usage->code);
    }
    const auto& arguments = std::get<Arguments>(parsed);
    log::configure(world.rank(), world.size(), arguments.level);
    install_stop_signals();
    execute(arguments, world);
    return static_cast<int>(ExitCode::ok);
  } catch (const std::exception& error) {
    return end_with(ending_of(error), runtime);
  } catch (...) {
    return end_with({false, ExitCode::internal, "unknown exception"}, runtime);
  }
}

}  // namespace isobath::cli
