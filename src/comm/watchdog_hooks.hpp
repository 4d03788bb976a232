#pragma once
#include <memory>
#include <string>

namespace isobath::comm {

/// Tells the watchdog who it speaks for and how to end the job; called by Runtime, which alone knows both.
void set_watchdog_identity(int rank, std::string host, void (*end_job)(int exit_code));

class Inquiry;
/// Through which the watchdog asks other ranks; without one (nullptr, as at the start) every wait beyond the
/// limit ends the job. Precondition: the watchdog is off.
void set_watchdog_inquiry(std::unique_ptr<Inquiry> inquiry);

}  // namespace isobath::comm
