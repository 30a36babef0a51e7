"""Training a classifier (steps 1 and 5): ``SLM.fit`` against ``Trainer`` of transformers.

The same MiniLM, head, rows, epochs, batch size, learning rate and schedule. ``Trainer`` pads each batch to its longest
row, as ours does; ours also puts rows of like length together. The third side is ours with ``dtype = "auto"``
(`ratio_auto_vs_hf_trainer`; `auto_is` says what that is here), which ``Trainer`` is not given. Checked: mean accuracy
on the demo's test rows after each, which differs from that of ``Trainer`` by 5 points at most (with ``--quick``, of
few rows and seeds, by 20).
"""

import statistics
import tempfile
import time
import warnings

import torch
from generation import demo_config
from measure import agree, arguments, finish, in_turn, peak_memory, ratio, spread
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from crosslm.config import FitConfig
from crosslm.data.examples import Examples
from crosslm.data.split import load_split
from crosslm.models.dtypes import fast_dtype
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder


class Rows(torch.utils.data.Dataset):
    """Encoded rows, as ``Trainer`` takes them."""

    def __init__(self, slm: SLM, examples: Examples) -> None:
        self.rows = slm.tokenizer(examples.texts, truncation=True, max_length=slm.max_length)["input_ids"]
        self.labels = examples.labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


def main() -> None:
    """Train all in turn, with another seed each time."""
    options = arguments(__doc__)
    rows, epochs, repeats = (64, 1, 1) if options.quick else (512, 2, 3)
    config = demo_config(False)
    split = load_split(config)
    training = split.judge.take(range(rows))
    fit = FitConfig(epochs=epochs, learning_rate=1e-4)
    folder = model_folder(config.slm.models[0].model, cache_folder())
    accuracy: dict[str, list[float]] = {"ours": [], "auto": [], "trainer": []}
    seeds = dict.fromkeys(accuracy, 0)

    def keep(side: str, slm: SLM, started: float) -> float:
        seconds = time.perf_counter() - started
        accuracy[side].append(slm.accuracy(split.test))
        return seconds

    def fresh(side: str) -> SLM:
        seeds[side] += 1
        length, seed = config.slm.max_length, seeds[side]
        return SLM.load(folder, config.task.labels, length, seed, freeze_embeddings=True, device=options.device)

    def ours(side: str, dtype: str) -> float:
        slm, started = fresh(side), time.perf_counter()
        slm.fit(training, fit.model_copy(update={"dtype": dtype}), seeds[side])
        return keep(side, slm, started)

    def trainer() -> float:
        slm, started = fresh("trainer"), time.perf_counter()
        with tempfile.TemporaryDirectory() as output, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(
                slm.model,
                TrainingArguments(
                    output_dir=output,
                    num_train_epochs=epochs,
                    per_device_train_batch_size=fit.batch_size,
                    learning_rate=fit.learning_rate,
                    warmup_steps=fit.warmup_fraction,
                    weight_decay=fit.weight_decay,
                    seed=seeds["trainer"],
                    report_to=[],
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                    use_cpu=options.device == "cpu",
                    dataloader_pin_memory=False,
                ),
                data_collator=DataCollatorWithPadding(slm.tokenizer),
                train_dataset=Rows(slm, training),
            ).train()
        return keep("trainer", slm, started)

    sides = {"trainer": trainer, "ours": lambda: ours("ours", "float32"), "auto": lambda: ours("auto", "auto")}
    seconds = in_turn(sides, repeats)
    figures = {
        "ratio_vs_hf_trainer": ratio(seconds["trainer"], seconds["ours"]),
        "ratio_auto_vs_hf_trainer": ratio(seconds["trainer"], seconds["auto"]),
        "auto_is": str(fast_dtype(options.device)).removeprefix("torch."),
        "rows_per_second": {
            side: spread([rows * epochs / second for second in values]) for side, values in seconds.items()
        },
        "accuracy": {side: round(statistics.mean(values), 4) for side, values in accuracy.items()},
        "accuracies": accuracy,
        "rows": rows,
        "epochs": epochs,
        "peak_bytes": peak_memory(),
    }
    mean = figures["accuracy"]
    apart = max(abs(mean[side] - mean["trainer"]) for side in mean)
    agree({"mean accuracy": (apart, 0.2 if options.quick else 0.05)})
    finish("slm", figures, options)


if __name__ == "__main__":
    main()
