"""What a reader of docs/results.md wants first: does it help, whom, at what price, and what to set."""

from typing import Any

TEXT = """\
## In short

- **Does my classifier get better?** Under preset `recommended` from {standalone:.3f} to {crosslm:.3f} in the
  mean of four datasets: {slm_gain_vs_standalone} ({each}). Of {clients} clients {losers} lose, at most
  {worst:.1f} points. It depends on how far a client's own classifier is below what one classifier on all
  clients' text reaches ({distances}; "Who gains").
- **Is it the LLM's learning?** Hardly. CrossLM ends {slm_gain_vs_data_free_kd} above Data-free KD, which has
  the same judges and as many texts of the LLM as it was. What helps are the judges.
- **Beside the simplest thing.** A logistic regression on frozen vectors of the same sentence encoder, which
  a silo fits to its own rows, is right on {regression[alone]:.3f} in the mean of the four datasets,
  and on {regression[balanced]:.3f} where each label counts alike ("Beside a logistic regression").
- **A good classifier gains nothing.** The demo with classifiers as `crosslm init` writes them (a sentence
  encoder with the mean of its tokens; pools of 384 texts), one seed: {as_init[standalone][mean]:.3f} before,
  {as_init[crosslm][mean]:.3f} after, Data-free KD {as_init[data_free_kd][mean]:.3f}. The packaged
  configurations have weaker ones, with the head that the paper's have.
- **The paper's method as it is** (preset `paper`) does not bring here what it brings there: {paper} for the
  classifiers, with a smaller LLM, smaller classifiers and fewer rows. On Yahoo! Answers it breaks the LLM with
  every seed.
- **The LLM** classifies the task's text {nlu_gain} better, and what it writes fits its label {nlg_judge_gain}
  more often, by a judge of its own. The price: its perplexity on other text rises by {growth:.0f} % in the
  worst case. Fine-tuned on four other tasks it
  ends {generalization_mean_change} from where the original does, in their mean ({generalization_seeds} of each; the
  original on another machine).
- **What to set**: preset `recommended`, and `slm.weigh_judges = true`, which `crosslm init` writes. With many
  labels a longer step 5 (`slm.synthetic.epochs`, as in the packaged `yahoo_answers`), and `federation.closing_original
  = 0` is worth a trial. `llm.interpolation` below 0.7 where the LLM must forget less. `crosslm run --seeds 3`
  says for your own text which client gains, and a client keeps what it had where its held-out rows say so
  (`acceptance`).
"""
GAIN = "preset recommended: CrossLM - Standalone, points"
OURS = "preset recommended: CrossLM"


def in_short(report: dict[str, Any], as_init: dict[str, Any], regression: dict[str, float]) -> list[str]:
    """The answer in a few lines.

    Args:
        report: the tables of `crosslm reproduce`.
        as_init: the demo as `crosslm init` writes it.
        regression: mean accuracies of a logistic regression, ``alone`` and ``balanced``.
    """
    tables, head = report["tables"], report["headline"]["recommended"]
    cells = {row["name"].split(" (")[0]: row["cells"] for row in tables["4"]["rows"] if row["by"] == "ours"}
    by_task = zip(tables["4"]["columns"][:-1], cells[GAIN], strict=False)
    said = {
        "standalone": cells["Standalone"][-1]["value"],
        "crosslm": crosslm_mean(tables),
        "each": ", ".join(f"{task} {cell['value']:+.1f}" for task, cell in by_task),
        "as_init": as_init["summary"]["slm"],
        "regression": regression,
        "paper": points(report["headline"]["paper"], "slm_gain_vs_standalone"),
        "growth": head["ptb_growth_percent"],
        "generalization_seeds": "one seed"
        if (seeds := head["seeds"]["generalization_mean_change"]) == 1
        else f"{seeds} seeds",
    }
    return [TEXT.format_map(said | who(tables["gains"]) | {name: points(head, name) for name in head["intervals"]})]


def crosslm_mean(tables: dict[str, Any]) -> float:
    """Accuracy of the clients' classifiers under preset recommended, in the mean of the tasks."""
    (ours,) = [row["cells"] for row in tables["4"]["rows"] if row["by"] == "ours" and row["name"] == OURS]
    return float(ours[-1]["value"])


def points(head: dict[str, Any], name: str) -> str:
    """A headline figure in points, with its interval."""
    low, high = head["intervals"][name]
    return f"{head[name]:+.1f} points [{low:+.1f}, {high:+.1f}]"


def who(gains: dict[str, Any]) -> dict[str, Any]:
    """Whom preset recommended helps."""
    start = "preset recommended, "
    rows = {row["name"].removeprefix(start): row["cells"] for row in gains["rows"] if row["name"].startswith(start)}
    return {
        "clients": sum(round(cells[0]["value"]) for cells in rows.values()),
        "losers": sum(round(cells[-1]["value"]) for cells in rows.values()),
        "worst": -min(cells[4]["value"] for cells in rows.values()),
        "distances": "; ".join(f"{name}: {cells[3]['value']:+.1f}" for name, cells in rows.items()),
    }
