#include <malloc.h>

#include <isobath/cli/guarded_main.hpp>
#include <isobath/core/tensor_memory.hpp>

int main(int argc, char** argv) {
  isobath::map_tensors();
  // What libraries work in comes and goes by the megabyte too: without this each piece is mapped, zeroed page
  // by page and unmapped again. C libraries before glibc 2.35 take 32 MiB at most.
  if (mallopt(M_MMAP_THRESHOLD, 256 << 20) == 0) {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
  }
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  // Threads that read or write a block leave their memory to the one that computes.
  mallopt(M_ARENA_MAX, 1);
  isobath::comm::Runtime runtime(argc, argv);
  return isobath::cli::guarded_main(argc, argv, runtime);
}
