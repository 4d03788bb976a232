#include <gtest/gtest.h>

#include <isobath/cli/arguments.hpp>

namespace isobath::cli {
namespace {

std::variant<Arguments, Usage> parsed(std::vector<const char*> words) {
  words.insert(words.begin(), "isobath");
  return parse_arguments(static_cast<int>(words.size()), words.data());
}

/// The usage text with its code in front; "accepted" when the words are a command.
std::string usage_of(const std::vector<const char*>& words) {
  const auto result = parsed(words);
  const auto* usage = std::get_if<Usage>(&result);
  return usage == nullptr ? "accepted" : fmt::format("{} {}", static_cast<int>(usage->code), usage->text);
}

TEST(Arguments, StagesTakeAConfigurationSettingsAndResume) {
  const auto a = std::get<Arguments>(
      parsed({"quantize", "--set", "a.b=1", "run.yaml", "--set", "c=[x, y]", "--resume", "--verbose"}));

  EXPECT_EQ(a.command, Command::quantize);
  EXPECT_EQ(a.config_path, "run.yaml");
  EXPECT_EQ(a.settings, (std::vector<std::string>{"a.b=1", "c=[x, y]"}));
  EXPECT_TRUE(a.resume);
  EXPECT_EQ(a.level, log::Level::debug);
}

TEST(Arguments, EveryCommandIsKnown) {
  EXPECT_EQ(std::get<Arguments>(parsed({"run", "c"})).command, Command::run);
  EXPECT_EQ(std::get<Arguments>(parsed({"measure", "c"})).command, Command::measure);
  EXPECT_EQ(std::get<Arguments>(parsed({"-q", "evaluate", "c"})).level, log::Level::warning);
  EXPECT_EQ(std::get<Arguments>(parsed({"check", "c", "--ranks", "64"})).n_ranks, 64);
  EXPECT_TRUE(std::get<Arguments>(parsed({"check", "--keys"})).shows_keys);
  EXPECT_TRUE(std::get<Arguments>(parsed({"check", "--schema"})).shows_schema);
  EXPECT_EQ(std::get<Arguments>(parsed({"inspect", "p", "--top", "3", "--json"})).top, 3);
  EXPECT_EQ(std::get<Arguments>(parsed({"inspect", "p"})).top, 20);
  EXPECT_EQ(std::get<Arguments>(parsed({"inspect", "p", "--by", "channel"})).granularity, "channel");
  EXPECT_EQ(usage_of({"inspect", "p", "--by", "row"}).substr(0, 2), "2 ");
  EXPECT_EQ(std::get<Arguments>(parsed({"version"})).command, Command::version);
  EXPECT_EQ(usage_of({"--version"}).substr(0, 10), "0 isobath ");
  const auto plan = std::get<Arguments>(parsed({"plan", "c", "--cluster", "k", "--ranks", "32",
                                                "--model-config", "m", "--json", "f", "--set", "a=1"}));
  EXPECT_EQ(plan.command, Command::plan);
  EXPECT_EQ(plan.cluster, "k");
  EXPECT_EQ(plan.n_ranks, 32);
  EXPECT_EQ(plan.model_config, "m");
  EXPECT_EQ(plan.json_output, "f");
  EXPECT_EQ(plan.settings, (std::vector<std::string>{"a=1"}));
  EXPECT_TRUE(std::get<Arguments>(parsed({"plan", "--calibrate"})).calibrates);
  EXPECT_EQ(std::get<Arguments>(parsed({"plan", "--calibrate", "--output", "o"})).cluster_output, "o");
}

TEST(Arguments, StagesTakeATimeline) {
  for (const char* command : {"run", "measure", "quantize", "evaluate"})
    EXPECT_EQ(std::get<Arguments>(parsed({command, "c", "--trace", "t.json"})).trace, "t.json") << command;
}

TEST(Arguments, EvaluateTakesACheckpointOrTheOriginal) {
  const auto a = std::get<Arguments>(parsed({"evaluate", "c", "--checkpoint", "d", "--json", "f"}));
  EXPECT_EQ(a.checkpoints, std::vector<std::string>{"d"});
  const auto several =
      std::get<Arguments>(parsed({"evaluate", "c", "--checkpoint", "d", "--checkpoint", "e"}));
  EXPECT_EQ(several.checkpoints, (std::vector<std::string>{"d", "e"}));
  EXPECT_EQ(a.json_output, "f");
  EXPECT_TRUE(std::get<Arguments>(parsed({"evaluate", "c", "--original-only"})).original_only);

  EXPECT_EQ(usage_of({"evaluate", "c", "--checkpoint", "d", "--original-only"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"evaluate", "c", "--json", "f"}).substr(0, 50),
            "2 evaluate: --json needs --checkpoint or --origina");
}

TEST(Arguments, AllocateTakesOneBudgetAndAMethod) {
  const auto a = std::get<Arguments>(
      parsed({"allocate", "c", "--budget", "3.0", "--method", "hawq-v2", "--output", "widths.yaml"}));
  EXPECT_EQ(a.command, Command::allocate);
  EXPECT_EQ(a.budget_bits, 3.0);
  EXPECT_EQ(a.budget_bytes, 0);
  EXPECT_EQ(a.method, "hawq-v2");
  EXPECT_EQ(a.allocation_output, "widths.yaml");
  EXPECT_FALSE(a.no_first_order);
  EXPECT_EQ(std::get<Arguments>(parsed({"allocate", "c", "--budget-bytes", "1000"})).budget_bytes, 1000);

  EXPECT_EQ(usage_of({"allocate", "c"}).substr(0, 30), "2 allocate: --budget BITS or -");
  EXPECT_EQ(usage_of({"allocate", "c", "--budget", "3", "--budget-bytes", "9"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"allocate", "c", "--budget", "-3"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"allocate", "c", "--budget", "3", "--method", "guess"}).substr(0, 2), "2 ");
}

TEST(Arguments, DiagnoseMeasuresSomeLinearsOrBlocks) {
  const auto a =
      std::get<Arguments>(parsed({"diagnose", "c", "--modules", "12", "--sequences", "3", "--samples", "2",
                                  "--tokens", "t", "--checkpoint", "d", "--json", "f"}));
  EXPECT_EQ(a.command, Command::diagnose);
  EXPECT_EQ(a.modules, 12);
  EXPECT_EQ(a.sequences, 3);
  EXPECT_EQ(a.samples, 2);
  EXPECT_EQ(a.tokens, "t");
  EXPECT_EQ(a.checkpoints, std::vector<std::string>{"d"});
  EXPECT_EQ(a.json_output, "f");
  EXPECT_TRUE(std::get<Arguments>(parsed({"diagnose", "c", "--blocks"})).only_blocks);

  EXPECT_EQ(usage_of({"diagnose", "c", "--blocks", "--modules", "3"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"diagnose", "c", "--sequences", "0"}).substr(0, 2), "2 ");
}

TEST(Arguments, CompareTakesTwoPaths) {
  const auto a = std::get<Arguments>(parsed({"compare", "a", "b", "--top", "3"}));
  EXPECT_EQ(a.command, Command::compare);
  EXPECT_EQ(a.statistics, "a");
  EXPECT_EQ(a.other_statistics, "b");
  EXPECT_EQ(a.top, 3);

  EXPECT_EQ(usage_of({"compare", "a"}).substr(0, 2), "2 ");
}

TEST(Arguments, HelpIsNoError) {
  for (const char* command : {"run", "measure", "allocate", "quantize", "evaluate", "diagnose", "plan",
                              "inspect", "compare", "check", "version"}) {
    const std::string help = usage_of({command, "--help"});
    EXPECT_EQ(help.substr(0, 2), "0 ") << command;
    EXPECT_NE(help.find("Example: "), std::string::npos) << help;
    EXPECT_NE(help.find("Exit codes: "), std::string::npos) << help;
  }
  const std::string help = usage_of({"--help"});
  EXPECT_EQ(help.substr(0, 2), "0 ");
  EXPECT_NE(help.find("inspect"), std::string::npos);
}

TEST(Arguments, MistakesAreUsageErrors) {
  EXPECT_EQ(usage_of({}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"runs", "c"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"run"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"run", "c", "--sett", "a=1"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"run", "c", "--set"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"check"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"plan"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"plan", "c", "--output", "o"}).substr(0, 2), "2 ");  // only with --calibrate
  EXPECT_EQ(usage_of({"check", "c", "--ranks", "0"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"inspect", "p", "--top", "x"}).substr(0, 2), "2 ");
  EXPECT_EQ(usage_of({"run", "c", "-v", "-q"}).substr(0, 2), "2 ");
}

}  // namespace
}  // namespace isobath::cli
