#include <isobath/cli/guarded_main.hpp>

int main(int argc, char** argv) {
  isobath::comm::Runtime runtime(argc, argv);
  return isobath::cli::guarded_main(argc, argv, runtime);
}
