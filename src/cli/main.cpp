#include <malloc.h>

#include <isobath/cli/guarded_main.hpp>

int main(int argc, char** argv) {
  // Activations, and the logits of a chunk of tokens most of all, come and go by the megabyte: without this
  // each one is mapped, zeroed page by page and unmapped again. C libraries before glibc 2.35 take 32 MiB at
  // most.
  if (mallopt(M_MMAP_THRESHOLD, 256 << 20) == 0) {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
  }
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  // Threads that read or write a block leave their memory to the one that computes.
  mallopt(M_ARENA_MAX, 1);
  isobath::comm::Runtime runtime(argc, argv);
  return isobath::cli::guarded_main(argc, argv, runtime);
}
