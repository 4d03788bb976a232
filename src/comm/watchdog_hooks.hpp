#pragma once
#include <string>

namespace isobath::comm {

/// Tells the watchdog who it speaks for and how to end the job; called by Runtime, which alone knows both.
void set_watchdog_identity(int rank, std::string host, void (*end_job)(int exit_code));

}  // namespace isobath::comm
