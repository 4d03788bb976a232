#include <malloc.h>

#include <isobath/cli/guarded_main.hpp>

int main(int argc, char** argv) {
  // Activations come and go by the megabyte: without this each one is mapped, zeroed page by page and
  // unmapped again.
  constexpr int kKeptBytes = 1 << 30;
  mallopt(M_MMAP_THRESHOLD, kKeptBytes);
  mallopt(M_TRIM_THRESHOLD, kKeptBytes);
  isobath::comm::Runtime runtime(argc, argv);
  return isobath::cli::guarded_main(argc, argv, runtime);
}
