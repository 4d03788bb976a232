#include <functional>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/comm/communicator.hpp>
#include <isobath/core/log.hpp>
#include <random>

#include "checkpoint/scratch.hpp"
#include "support/mpi_environment.hpp"

namespace isobath::checkpoint::test {
namespace {

namespace fs = std::filesystem;
using isobath::testing::world;

constexpr unsigned kSeed = 20240611;

/// Two generations, of which the newer is then damaged.
class Damage : public ::testing::Test {
 protected:
  void SetUp() override {
    on_root(world(), [&] { fs::create_directory(outputs()); });
    GenerationStore store(directory(), 2, {{"model", "tiny"}}, world());
    commit_step(store, world(), outputs(), 1);
    commit_step(store, world(), outputs(), 2);
  }
  [[nodiscard]] fs::path directory() const { return scratch_.path() / "checkpoint"; }
  [[nodiscard]] fs::path newest() const { return directory() / "gen-000002"; }
  [[nodiscard]] fs::path outputs() const { return scratch_.path() / "outputs"; }

  /// The newer generation's files, and an output only it vouches for.
  [[nodiscard]] std::vector<fs::path> files() const {
    std::vector<fs::path> found{newest() / "manifest.json", newest() / "state.bin",
                                outputs() / output_name(2, 0)};
    for (int rank = 0; rank < world().size(); ++rank)
      found.push_back(newest() / fmt::format("rank-{:04}.h5", rank));
    return found;
  }

  /// Step of the generation that is used; 0: none. Its content is verified.
  int64_t opened_step() {
    GenerationStore store(directory(), 2, {{"model", "tiny"}}, world());
    const auto opened = store.open_latest(outputs());
    if (!opened) return 0;
    expect_step(*opened, opened->number());
    return opened->number();
  }

  /// Changes one file by `damage`, expects that the older generation is used instead, and mends it again.
  void expect_detected(const fs::path& path, const std::function<void()>& damage, const std::string& what) {
    std::string bytes;
    on_root(world(), [&] {
      bytes = read_bytes(path);
      damage();
    });
    EXPECT_EQ(opened_step(), 1) << what << " of " << path << " was not detected";
    on_root(world(), [&] { write_bytes(path, bytes); });
  }

  Scratch scratch_{world()};
};

/// Runs `action` and returns what rank 0 wrote to stderr meanwhile; the same on all ranks.
template <class Action>
std::string stderr_of(Action&& action) {
  ::testing::internal::CaptureStderr();
  action();
  std::string text = ::testing::internal::GetCapturedStderr();
  world().broadcast(text, 0);
  return text;
}

TEST_F(Damage, WithoutItTheNewestGenerationIsUsed) {
  EXPECT_EQ(opened_step(), 2);
}

TEST_F(Damage, FlippedBitsOfEveryFileAreDetected) {
  constexpr int kFlipsPerFile = 20;  // 300 over the files of the three rank counts
  log::configure(world().rank(), world().size(), log::Level::error);
  std::mt19937 random(kSeed);
  for (const fs::path& path : files()) {
    const size_t size = fs::file_size(path);
    for (int flip = 0; flip < kFlipsPerFile; ++flip) {
      const size_t position = flip == 0 ? 0 : flip == 1 ? size - 1 : random() % size;
      const int bit = static_cast<int>(random() % 8);
      const auto damage = [&] {
        std::string bytes = read_bytes(path);
        bytes[position] = static_cast<char>(bytes[position] ^ (1 << bit));
        write_bytes(path, bytes);
      };
      expect_detected(path, damage, fmt::format("flip of bit {} of byte {} (seed {})", bit, position, kSeed));
    }
  }
  log::configure(world().rank(), world().size(), log::Level::info);
  EXPECT_EQ(opened_step(), 2) << "the mended generation is not used";
}

TEST_F(Damage, TruncatedMissingEmptyAndLongerFilesAreDetectedAndNamed) {
  for (const fs::path& path : files()) {
    const auto expect_named = [&](const std::function<void()>& damage, const std::string& what) {
      const std::string text = stderr_of([&] { expect_detected(path, damage, what); });
      EXPECT_NE(text.find("warning"), std::string::npos) << what << ": " << text;
      EXPECT_NE(text.find(path.filename().string()), std::string::npos) << what << ": " << text;
    };
    expect_named([&] { fs::resize_file(path, fs::file_size(path) - 1); }, "truncation by a byte");
    expect_named([&] { fs::resize_file(path, fs::file_size(path) / 2); }, "truncation to the half");
    expect_named([&] { fs::resize_file(path, 0); }, "zero length");
    expect_named([&] { fs::resize_file(path, fs::file_size(path) + 1); }, "an added byte");
    expect_named([&] { fs::remove(path); }, "absence");
  }
}

TEST_F(Damage, SwappedFilesOfRanksAreDetected) {
  if (world().size() < 2) GTEST_SKIP() << "one rank has nothing to swap with";
  on_root(world(), [&] {
    fs::rename(newest() / "rank-0000.h5", newest() / "x");
    fs::rename(newest() / "rank-0001.h5", newest() / "rank-0000.h5");
    fs::rename(newest() / "x", newest() / "rank-0001.h5");
  });
  EXPECT_EQ(opened_step(), 1);
}

TEST_F(Damage, FilesOfAnotherGenerationAreDetected) {
  for (const std::string name : {"rank-0000.h5", "state.bin", "manifest.json"}) {
    const auto swap_in = [&] {
      fs::copy_file(directory() / "gen-000001" / name, newest() / name, fs::copy_options::overwrite_existing);
    };
    expect_detected(newest() / name, swap_in, "replacement");
  }
}

TEST_F(Damage, TheNextCommitReplacesADamagedGenerationAndKeepsTheGoodOne) {
  on_root(world(), [&] { fs::resize_file(newest() / "state.bin", 3); });
  GenerationStore store(directory(), 2, {{"model", "tiny"}}, world());
  const auto opened = store.open_latest(outputs());
  EXPECT_TRUE(opened && opened->number() == 1);

  commit_step(store, world(), outputs(), 3);
  world().barrier();

  EXPECT_TRUE(fs::exists(directory() / "gen-000001"));
  EXPECT_FALSE(fs::exists(newest()));
  EXPECT_EQ(opened_step(), 3);
}

TEST_F(Damage, WithoutAnyValidGenerationNothingIsUsed) {
  on_root(world(), [&] {
    fs::resize_file(newest() / "state.bin", 3);
    fs::remove(directory() / "gen-000001" / "rank-0000.h5");
  });
  EXPECT_EQ(opened_step(), 0);
}

}  // namespace
}  // namespace isobath::checkpoint::test
