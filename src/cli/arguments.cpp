#include <isobath/cli/arguments.hpp>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstring>
#include <isobath/config/schema.hpp>
#include <isobath/core/error.hpp>
#include <isobath/core/version.hpp>
#include <isobath/pipeline/allocate.hpp>
#include <sstream>

namespace isobath::cli {
namespace {

constexpr const char* kFooter =
    R"(Exit codes: 0 done; 2 usage or configuration; 3 bad input (checkpoint, tokens); 4 disk or permission;
5 not finite or no factorization; 6 invalid state or a resume that does not match; 7 defect, or another
rank failed; 75 stopped on request (SIGUSR1, SIGTERM), continue with --resume.)";

/// Accepts numbers above zero.
CLI::Validator positive() {
  return {[](const std::string& text) {
            char* end = nullptr;
            const double value = std::strtod(text.c_str(), &end);
            return end != text.c_str() && *end == '\0' && value > 0 && std::isfinite(value)
                       ? std::string()
                       : "expected a number above 0, found " + text;
          },
          ""};
}

struct Builder {
  CLI::App app{"Quantizes large language models on many ranks, guided by activation sensitivity.", "isobath"};
  Arguments arguments;
  bool is_verbose = false, is_quiet = false;

  CLI::App* command(Command value, const std::string& name, const std::string& description,
                    const std::string& example) {
    CLI::App* sub = app.add_subcommand(name, description);
    sub->footer("Example: " + example + "\n\n" + kFooter);
    sub->callback([this, value] { arguments.command = value; });
    return sub;
  }

  CLI::Option* config(CLI::App* sub) {
    CLI::Option* path =
        sub->add_option("CONFIG", arguments.config_path,
                        "YAML file that describes the run. Relative paths in it start at the current "
                        "directory.");
    sub->add_option(
           "--set", arguments.settings,
           "Sets a key of the configuration, as in --set quantization.bits=2. May be given several times; it "
           "wins over the file.")
        ->type_name("KEY=VALUE")
        ->take_all()
        ->allow_extra_args(false);
    return path;
  }

  void trace(CLI::App* sub) {
    sub->add_option(
           "--trace", arguments.trace,
           "Also writes a timeline of all ranks to this file, for chrome://tracing or ui.perfetto.dev.")
        ->type_name("FILE");
  }

  void stage(Command value, const std::string& name, const std::string& description,
             const std::string& example) {
    CLI::App* sub = command(value, name, description, example);
    config(sub)->required();
    auto* resume = sub->add_flag("--resume", arguments.resume,
                                 "Continues the interrupted run in the configuration's output directory.");
    sub->add_flag(
           "--resume-or-start", arguments.resume_or_start,
           "Continues the run in the output directory, or starts it where there is none: for job scripts "
           "that are started again.")
        ->excludes(resume);
    trace(sub);
  }
};

void add_commands(Builder& b) {
  Arguments& a = b.arguments;
  b.stage(Command::run, "run", "Measures, quantizes and evaluates a model, one stage after the other.",
          "mpirun -n 4 isobath run configs/quickstart.yaml --set quantization.bits=4");
  b.stage(Command::measure, "measure", "Measures the sensitivity statistics and leaves them in measure/.",
          "mpirun -n 4 isobath measure configs/quickstart.yaml");
  b.stage(Command::quantize, "quantize", "Quantizes the model with the statistics that measure left.",
          "mpirun -n 4 isobath quantize configs/quickstart.yaml --resume");

  CLI::App* allocate = b.command(
      Command::allocate, "allocate",
      "Chooses a width for each fused set (q/k/v, o, gate/up, down of each block) under a budget, from "
      "statistics measured with sensitivity.gram.bits. Needs no mpirun.",
      "isobath allocate configs/smollm2-mixed.yaml --budget 3.0");
  b.config(allocate)->required();
  auto* budget = allocate->add_option("--budget", a.budget_bits,
                                      "Stored bits a quantized weight, scales included, on average.");
  budget->type_name("BITS")->check(positive());
  auto* bytes = allocate->add_option("--budget-bytes", a.budget_bytes,
                                     "Bytes of all quantized linears, scales included, instead of --budget.");
  bytes->type_name("BYTES")->check(positive())->excludes(budget);
  allocate
      ->add_option(
          "--method", a.method,
          "quadratic weighs pairs of fused sets too; diagonal only each alone; weighted, hawq-v2 and output "
          "are scores of other methods.")
      ->capture_default_str()
      ->check(CLI::IsMember(pipeline::allocation_methods()));
  allocate->add_flag(
      "--no-first-order", a.no_first_order,
      "With loss nll, leaves out the mean first-order change of the loss: keeps the model as it is, "
      "rather than fits it to the calibration text.");
  allocate
      ->add_option("--output", a.allocation_output,
                   "File for the widths, YAML, with a report beside it (.json). Without it, bits.yaml and "
                   "allocate.json in the run directory.")
      ->type_name("FILE");

  CLI::App* evaluate =
      b.command(Command::evaluate, "evaluate",
                "Compares a quantized checkpoint with the original model on the evaluation tokens.",
                "mpirun -n 4 isobath evaluate configs/quickstart.yaml --checkpoint runs/a/model");
  b.config(evaluate)->required();
  b.trace(evaluate);
  auto* checkpoint = evaluate->add_option(
      "--checkpoint", a.checkpoints,
      "Checkpoint directory to evaluate; may be given several times, for one pass over the "
      "tokens. Without it, the run directory's is taken.");
  checkpoint->type_name("DIR")->expected(1)->take_all();
  auto* original = evaluate->add_flag("--original-only", a.original_only,
                                      "Evaluates only the original model, without a run directory.");
  checkpoint->excludes(original);
  evaluate
      ->add_option("--json", a.json_output,
                   "Also writes the result to this file. Needs --checkpoint or --original-only; a run "
                   "directory has its "
                   "evaluation.json.")
      ->type_name("FILE");

  CLI::App* diagnose = b.command(
      Command::diagnose, "diagnose",
      "Measures what quantizing each linear and each block alone does to the model, beside what the "
      "sensitivities predict, and names the linears at risk. Every rank holds both models.",
      "mpirun -n 4 isobath diagnose configs/quickstart.yaml --modules 40");
  b.config(diagnose)->required();
  b.trace(diagnose);
  diagnose
      ->add_option("--checkpoint", a.checkpoints, "Quantized checkpoint; without it, the run directory's.")
      ->type_name("DIR")
      ->expected(1);
  diagnose->add_option("--tokens", a.tokens, "Token file to probe with; without it, calibration.tokens.")
      ->type_name("FILE");
  diagnose->add_option("--sequences", a.sequences, "Sequences of calibration.length to probe with.")
      ->capture_default_str()
      ->check(CLI::Range(1, 1'000'000));
  diagnose->add_option("--samples", a.samples, "Labels drawn a token for the prediction.")
      ->capture_default_str()
      ->check(CLI::Range(1, 1'000));
  auto* modules = diagnose->add_option("--modules", a.modules,
                                       "Linears to measure, spread over the model; without it, all of them.");
  modules->check(CLI::Range(1, 1'000'000));
  diagnose->add_flag("--blocks", a.only_blocks, "Measures whole blocks only.")->excludes(modules);
  diagnose->add_option("--top", a.top, "Number of linears in the table.")
      ->capture_default_str()
      ->check(CLI::Range(1, 1'000'000'000));
  diagnose
      ->add_option("--json", a.json_output,
                   "File for all numbers; without it, diagnose.json in the run directory.")
      ->type_name("FILE");

  CLI::App* inspect = b.command(
      Command::inspect, "inspect",
      "Lists modules, or their parts, by sensitivity, from a statistics file, a measure/ directory or a run "
      "directory. Needs no mpirun.",
      "isobath inspect runs/a/measure --top 10");
  inspect->add_option("PATH", a.statistics, "Statistics file or directory.")->required();
  inspect->add_option("--by", a.granularity, "What is scored: weight | channel | module | block.")
      ->capture_default_str()
      ->check(CLI::IsMember({"weight", "channel", "module", "block"}));
  inspect->add_option("--model", a.model, "With --by weight: directory of the model that was measured.")
      ->type_name("DIR");
  inspect->add_option("--top", a.top, "Number of rows of the table.")
      ->capture_default_str()
      ->check(CLI::Range(1, 1'000'000'000));
  inspect->add_flag("--json", a.as_json,
                    "Prints JSON instead of the table: all modules, or the --top first of other parts.");

  CLI::App* compare = b.command(
      Command::compare, "compare",
      "Compares the statistics of two runs linear by linear: other tokens, another loss, or behind a "
      "quantized prefix (measure/before-block-N). Needs no mpirun.",
      "isobath compare runs/a/measure runs/b/measure");
  compare->add_option("FIRST", a.statistics, "Statistics file or directory.")->required();
  compare->add_option("SECOND", a.other_statistics, "Statistics file or directory of the same model.")
      ->required();
  compare->add_option("--top", a.top, "Number of modules in the table.")
      ->capture_default_str()
      ->check(CLI::Range(1, 1'000'000'000));
  compare->add_flag("--json", a.as_json, "Prints all modules as JSON instead of the table.");

  CLI::App* check =
      b.command(Command::check, "check",
                "Validates a configuration and prints it complete, with what the run would do. Reads no "
                "weights and needs no mpirun.",
                "isobath check configs/quickstart.yaml --ranks 64");
  b.config(check);
  check->add_option("--ranks", a.n_ranks, "Number of ranks to check for. Without it, those running now.")
      ->check(CLI::Range(1, 1'000'000));
  auto* keys =
      check->add_flag("--keys", a.shows_keys, "Prints all keys with type, default and unit as Markdown.");
  check->add_flag("--schema", a.shows_schema, "Prints the JSON schema of the configuration.")->excludes(keys);

  CLI::App* plan = b.command(
      Command::plan, "plan",
      "Predicts memory, time and disk of a run on a cluster, proposes stages x replicas, and refuses what "
      "cannot fit. Reads config.json only and needs no mpirun. With --calibrate it measures this machine "
      "instead (under mpirun: with its network).",
      "isobath plan configs/llama-3.1-70b.yaml --cluster configs/clusters/h100-node.yaml");
  b.config(plan);
  plan->add_option("--cluster", a.cluster,
                   "Cluster description (YAML). Without it, the configuration's plan.cluster.")
      ->type_name("FILE");
  plan->add_option("--ranks", a.n_ranks, "Plans for this number of ranks of the cluster's kind.")
      ->check(CLI::Range(1, 1'000'000));
  plan->add_option("--model-config", a.model_config,
                   "config.json (or its directory) to take the shapes from when the model is not here.")
      ->type_name("FILE");
  plan->add_option("--json", a.json_output, "Also writes the plan to this file.")->type_name("FILE");
  auto* calibrate = plan->add_flag("--calibrate", a.calibrates,
                                   "Measures the rates of this machine and prints a cluster description.");
  plan->add_option("--output", a.cluster_output, "Writes the cluster description to this file instead.")
      ->type_name("FILE")
      ->needs(calibrate);

  b.command(Command::version, "version", "Prints the versions of isobath and of what it is built on.",
            "isobath version");
}

std::string did_you_mean(const std::string& unknown, const std::vector<std::string>& known) {
  const std::string nearest = config::nearest_key(unknown, known);
  return nearest.empty() ? std::string() : fmt::format("; did you mean {}?", nearest);
}

/// What is wrong with a word that no command or option has; empty when `b` has all of them.
std::string unknown_word(Builder& b, int argc, const char* const* argv) {
  std::vector<std::string> commands;
  for (const CLI::App* sub : b.app.get_subcommands({})) commands.push_back(sub->get_name());
  int first = 1;
  while (first < argc && argv[first][0] == '-') ++first;
  if (first < argc && std::ranges::find(commands, argv[first]) == commands.end())
    return fmt::format("unknown command {}{}", argv[first], did_you_mean(argv[first], commands));
  if (first == argc) return "";
  std::vector<std::string> options;
  for (const CLI::App* app : {static_cast<const CLI::App*>(&b.app),
                              static_cast<const CLI::App*>(b.app.get_subcommand(argv[first]))})
    for (const CLI::Option* option : app->get_options())
      for (const std::string& name : option->get_lnames()) options.push_back("--" + name);
  for (int i = first + 1; i < argc; ++i) {
    const std::string word(argv[i], std::min(std::strlen(argv[i]), std::strcspn(argv[i], "=")));
    if (word.starts_with("--") && word.size() > 2 && std::ranges::find(options, word) == options.end())
      return fmt::format("{} has no option {}{}", argv[first], word, did_you_mean(word, options));
  }
  return "";
}

std::string usage_problem(const Arguments& a) {
  const bool is_reference = a.shows_keys || a.shows_schema;
  if (a.command == Command::check && a.config_path.empty() && !is_reference)
    return "check: CONFIG is required (or --keys, or --schema)";
  if (a.command == Command::plan && a.config_path.empty() && !a.calibrates)
    return "plan: CONFIG is required (or --calibrate)";
  if (a.command == Command::evaluate && !a.json_output.empty() && a.checkpoints.empty() && !a.original_only)
    return "evaluate: --json needs --checkpoint or --original-only; a run directory has its own "
           "evaluation.json";
  if (a.command == Command::allocate && a.budget_bits <= 0 && a.budget_bytes <= 0)
    return "allocate: --budget BITS or --budget-bytes BYTES is required";
  return "";
}

}  // namespace

std::variant<Arguments, Usage> parse_arguments(int argc, const char* const* argv) {
  Builder b;
  b.app.require_subcommand(1);
  b.app.footer(std::string("Example: mpirun -n 2 isobath run configs/quickstart.yaml\n\n") + kFooter);
  b.app.fallthrough();
  constexpr size_t kOptionColumn = 28;
  b.app.get_formatter()->column_width(kOptionColumn);
  auto* verbose =
      b.app.add_flag("-v,--verbose", b.is_verbose, "Also prints what only a developer wants to know.");
  b.app.add_flag("-q,--quiet", b.is_quiet, "Prints only warnings, errors and results.")->excludes(verbose);
  b.app.set_version_flag("--version", fmt::format("isobath {} ({})", kVersion, kRevision),
                         "Prints the version; the command `version` prints what it is built on, too.");
  add_commands(b);
  try {
    b.app.parse(argc, argv);
  } catch (const CLI::ParseError& problem) {
    std::ostringstream out, err;
    const int code = b.app.exit(problem, out, err);
    std::string text = code == 0 ? out.str() : err.str();
    if (const std::string unknown = unknown_word(b, argc, argv); code != 0 && !unknown.empty())
      text = unknown + "\nRun with --help for more information.";
    if (code != 0) text.erase(text.find_last_not_of('\n') + 1);
    return Usage{code == 0 ? ExitCode::ok : ExitCode::config, text};
  }
  if (b.is_verbose) b.arguments.level = log::Level::debug;
  if (b.is_quiet) b.arguments.level = log::Level::warning;
  if (const std::string problem = usage_problem(b.arguments); !problem.empty())
    return Usage{ExitCode::config, problem + "\nRun with --help for more information."};
  return b.arguments;
}

}  // namespace isobath::cli
