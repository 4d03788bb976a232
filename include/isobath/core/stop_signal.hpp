#pragma once

namespace isobath {

/// Installs handlers of SIGUSR1 and SIGTERM that only set a flag, and ignores SIGXFSZ and SIGPIPE so that a
/// full disk or a closed pipe becomes an error message. Schedulers send these signals before they kill
/// (docs/reliability.md).
void install_stop_signals();

/// Whether this process was asked to stop. Local: ranks agree with `Communicator::any(stop_requested())`.
[[nodiscard]] bool stop_requested();

}  // namespace isobath
