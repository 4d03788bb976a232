#include <sys/resource.h>

#include <csignal>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/comm/communicator.hpp>
#include <optional>

#include "checkpoint/scratch.hpp"
#include "support/mpi_environment.hpp"

namespace isobath::checkpoint::test {
namespace {

namespace fs = std::filesystem;
using isobath::testing::world;

const Fingerprint kFingerprint{{"quantization.bits", "3"}, {"quantization.group", "64"}, {"model", "tiny"}};

struct Place {
  explicit Place(const comm::Communicator& comm) : scratch(comm) {
    on_root(comm, [&] { fs::create_directory(outputs()); });
  }
  [[nodiscard]] fs::path store() const { return scratch.path() / "checkpoint"; }
  [[nodiscard]] fs::path outputs() const { return scratch.path() / "outputs"; }
  [[nodiscard]] GenerationStore open(const comm::Communicator& comm, int64_t keep = 2) const {
    return GenerationStore(store(), keep, kFingerprint, comm);
  }
  /// Collective: other ranks return from a commit while rank 0 still removes old generations.
  [[nodiscard]] std::vector<std::string> names() const {
    world().barrier();
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(store()))
      found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  }
  Scratch scratch;
};

TEST(GenerationStore, AnEmptyStoreHasNoGeneration) {
  const Place place(world());
  EXPECT_FALSE(place.open(world()).open_latest(place.outputs()).has_value());
}

TEST(GenerationStore, ACommittedGenerationIsReadBackByEveryRank) {
  const Place place(world());
  GenerationStore writer = place.open(world());
  commit_step(writer, world(), place.outputs(), 1);

  const std::optional<Generation> opened = place.open(world()).open_latest(place.outputs());

  EXPECT_TRUE(opened.has_value());
  if (!opened) return;
  EXPECT_EQ(opened->number(), 1);
  expect_step(*opened, 1);
  EXPECT_FALSE(opened->contains("absent"));
  EXPECT_THROW(static_cast<void>(opened->read("absent")), CheckpointError);
}

TEST(GenerationStore, ReadersNeedNotBeAsManyAsTheWriters) {
  const int n_ranks = world().size(), rank = world().rank();
  for (int n_writers = 1; n_writers <= n_ranks; ++n_writers) {
    const Place place(world());
    const comm::Communicator writers = world().split(rank < n_writers ? 0 : 1, rank);
    if (rank < n_writers) {
      GenerationStore store = place.open(writers);
      commit_step(store, writers, place.outputs(), n_writers);
    }
    world().barrier();
    for (int n_readers = 1; n_readers <= n_ranks; ++n_readers) {
      const comm::Communicator readers = world().split(rank < n_readers ? 0 : 1, rank);
      if (rank < n_readers) {
        const auto opened = place.open(readers).open_latest(place.outputs());
        EXPECT_TRUE(opened.has_value()) << n_writers << " -> " << n_readers;
        if (opened) expect_step(*opened, n_writers);
      }
      world().barrier();
    }
  }
}

TEST(GenerationStore, NumbersGoOnInAResumedStoreAndOutputsAreVouchedForUntilTheEnd) {
  const Place place(world());
  {
    GenerationStore store = place.open(world());
    commit_step(store, world(), place.outputs(), 1);
  }
  GenerationStore resumed = place.open(world());
  EXPECT_TRUE(resumed.open_latest(place.outputs()).has_value());
  for (int64_t step = 2; step <= 4; ++step) commit_step(resumed, world(), place.outputs(), step);

  EXPECT_EQ(place.names(), (std::vector<std::string>{"gen-000003", "gen-000004"}));
  const auto latest = place.open(world()).open_latest(place.outputs());
  EXPECT_TRUE(latest && latest->number() == 4);
  // The first step's output is vouched for by generation 4, although another process wrote it three
  // generations ago.
  on_root(world(), [&] { write_bytes(place.outputs() / output_name(1, world().size() - 1), "damaged"); });
  EXPECT_FALSE(place.open(world()).open_latest(place.outputs()).has_value());
}

TEST(GenerationStore, KeepsAsManyGenerationsAsAsked) {
  for (const int64_t keep : {1, 3}) {
    const Place place(world());
    GenerationStore store = place.open(world(), keep);
    for (int64_t step = 1; step <= 5; ++step) commit_step(store, world(), place.outputs(), step);
    const std::vector<std::string> names = place.names();
    EXPECT_EQ(static_cast<int64_t>(names.size()), keep);
    EXPECT_EQ(names.back(), "gen-000005");
  }
}

TEST(GenerationStore, ADirectoryLeftByACrashIsRemovedAndNeverRead) {
  const Place place(world());
  {
    GenerationStore store = place.open(world());
    commit_step(store, world(), place.outputs(), 1);
  }
  on_root(world(), [&] {
    fs::copy(place.store() / "gen-000001", place.store() / "gen-000002.tmp", fs::copy_options::recursive);
    fs::create_directory(place.store() / "gen-2");
    fs::create_directory(place.store() / "unrelated.tmp");
  });

  const auto opened = place.open(world()).open_latest(place.outputs());

  EXPECT_TRUE(opened && opened->number() == 1);
  EXPECT_EQ(place.names(), (std::vector<std::string>{"gen-000001", "gen-2", "unrelated.tmp"}));
}

TEST(GenerationStore, AnotherFingerprintIsRefusedByNameWithBothValues) {
  const Place place(world());
  {
    GenerationStore store = place.open(world());
    commit_step(store, world(), place.outputs(), 1);
  }
  GenerationStore other(place.store(), 2, {{"quantization.bits", "4"}, {"model", "tiny"}, {"seed", "1"}},
                        world());

  const std::string message = expect_agreed_failure(
      world(), ExitCode::checkpoint, [&] { static_cast<void>(other.open_latest(place.outputs())); });

  for (const char* part :
       {"quantization.bits: 3 in the run, 4 now", "quantization.group: 64 in the run, absent now",
        "seed: absent in the run, 1 now"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  EXPECT_EQ(message.find("model"), std::string::npos) << message;
}

TEST(GenerationStore, ADiskThatFillsOnOneRankFailsOnAllAndLeavesTheOldGeneration) {
  const Place place(world());
  GenerationStore store = place.open(world());
  commit_step(store, world(), place.outputs(), 1);
  const bool is_last = world().rank() == world().size() - 1;
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  if (is_last) {
    std::signal(SIGXFSZ, SIG_IGN);
    constexpr rlim_t kLimitBytes = 64 << 10;
    const rlimit tight{kLimitBytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &tight);
  }
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  tensors.emplace_back("large" + std::to_string(world().rank()), at::ones({1 << 17}));

  const std::string message = expect_agreed_failure(
      world(), ExitCode::io, [&] { store.commit(state_of(2), tensors, place.outputs(), {}); });
  if (is_last) setrlimit(RLIMIT_FSIZE, &before);

  EXPECT_NE(message.find("rank-000" + std::to_string(world().size() - 1) + ".h5"), std::string::npos)
      << message;
  EXPECT_EQ(place.names(), std::vector<std::string>{"gen-000001"});
  const auto opened = place.open(world()).open_latest(place.outputs());
  EXPECT_TRUE(opened.has_value());
  if (opened) expect_step(*opened, 1);
  // The same store goes on once there is room.
  commit_step(store, world(), place.outputs(), 3);
  const auto after = place.open(world()).open_latest(place.outputs());
  EXPECT_TRUE(after && after->state().next_block == 3);
}

TEST(GenerationStore, AFailureInAnyStepIsTheSameOnAllRanksAndLeavesTheOldGeneration) {
  const Place place(world());
  GenerationStore store = place.open(world());
  commit_step(store, world(), place.outputs(), 1);
  const auto share = share_of(world().rank(), world().size(), 2);
  const bool is_last = world().rank() == world().size() - 1;

  const std::string absent = expect_agreed_failure(world(), ExitCode::io, [&] {
    store.commit(state_of(2), share, place.outputs(),
                 is_last ? std::vector<std::string>{"never-written.bin"} : std::vector<std::string>{});
  });
  EXPECT_NE(absent.find("never-written.bin"), std::string::npos) << absent;

  // The next number is 3: its name is taken by something that cannot be renamed over.
  on_root(world(), [&] { fs::create_directories(place.store() / "gen-000003" / "inside"); });
  expect_agreed_failure(world(), ExitCode::io,
                        [&] { store.commit(state_of(2), share, place.outputs(), {}); });
  on_root(world(), [&] { fs::remove_all(place.store() / "gen-000003"); });

  if (world().size() > 1) {
    const std::string twice = expect_agreed_failure(world(), ExitCode::internal, [&] {
      store.commit(state_of(2), {{"same", at::ones(1)}}, place.outputs(), {});
    });
    EXPECT_NE(twice.find("two ranks hand the tensor same"), std::string::npos) << twice;
  }
  on_root(world(), [&] {
    fs::rename(place.store(), place.scratch.path() / "aside");
    write_bytes(place.store(), "a file");
  });
  expect_agreed_failure(world(), ExitCode::io,
                        [&] { store.commit(state_of(2), share, place.outputs(), {}); });
  on_root(world(), [&] {
    fs::remove(place.store());
    fs::rename(place.scratch.path() / "aside", place.store());
  });

  EXPECT_EQ(place.names(), std::vector<std::string>{"gen-000001"});
  const auto opened = place.open(world()).open_latest(place.outputs());
  EXPECT_TRUE(opened.has_value());
  if (opened) expect_step(*opened, 1);
}

}  // namespace
}  // namespace isobath::checkpoint::test
