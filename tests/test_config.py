"""The configuration: what is refused and how it is said, presets, overrides, and the way back to TOML."""

import copy
import tomllib
from pathlib import Path

import pytest
import tomli_w
from pydantic import ValidationError

from crosslm.config import PRESETS, Config, merged
from crosslm.config_file import load, nearest, packaged
from crosslm.errors import ConfigError
from crosslm.sections.method import RewardConfig
from crosslm.sections.models import FitConfig, LLMConfig, SLMConfig
from crosslm.sections.privacy import PrivacyConfig


@pytest.fixture
def write(tmp_path, settings):
    """Write the settings, changed by a function, and give the path."""

    def written(change=lambda tables: None):
        tables = copy.deepcopy(settings)
        change(tables)
        path = tmp_path / "own.toml"
        path.write_text(tomli_w.dumps(tables))
        return path

    return written


def test_one_field_of_a_training_leaves_its_others_as_they_are(write):
    """Also where the same table elsewhere has other defaults."""

    def some(tables):
        tables["slm"] |= {"private": {"batch_size": 200}, "synthetic": {"epochs": 2}}

    slm = load(write(some)).slm
    assert (slm.private.batch_size, slm.private.epochs, slm.private.patience) == (200, 8, 3)
    assert (slm.synthetic.epochs, slm.synthetic.learning_rate) == (2, 3e-5)
    slm = load(write(some), ("slm.synthetic.batch_size=4",)).slm
    assert (slm.synthetic.batch_size, slm.synthetic.epochs, slm.synthetic.learning_rate) == (4, 2, 3e-5)


def test_an_error_names_where_the_value_came_from(write):
    path = write(lambda tables: tables["llm"].update(zzz=1))
    with pytest.raises(ConfigError) as refused:
        load(path, ("llm.samples=few", "llm.samples=many", "slm.private={epoch=1}"))
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("--set llm.samples=many: llm.samples: ") for line in lines)
    assert any(line.startswith("--set slm.private={epoch=1}: unknown key slm.private.epoch; ") for line in lines)
    assert any(line.startswith(f"{path}: unknown key llm.zzz; ") for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lmm.samples=3", r"^\S+own.toml with --set lmm.samples=3: unknown key lmm; did you mean 'llm'\?"),
        ('task.verbalizer.good=""', r"^\S+own.toml with --set task.verbalizer.good=\"\": task"),
        (
            "clients=[{id='a', train='x'}]",
            r"^\S+own.toml with --set clients=.*: the configuration: give either data.train",
        ),
        (  # and no more than that
            "slm.models=[{model='x',layers=3}]",
            r"^--set slm.models=\S+ unknown key slm.models.0.layers; did you mean 'num_hidden_layers'\?$",
        ),
        (
            "slm.models=x",
            r"slm.models: must be a list of tables, each with keys of: model, num_.*, pooling, found 'x'$",
        ),
        ("task.prompt.good=3", r"task.prompt.good: must be a text in quotes, or a list of such texts, found 3$"),
        ("slm.models=[]", r"slm.models: Tuple should have at least 1 item"),
        ("tracking=wandb", r'^--set tracking=wandb: tracking: must be a list, like \["wandb"\], found \'wandb\''),
    ],
)
def test_an_override_that_makes_a_table_wrong_is_named_beside_the_file(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load(write(), (override,))


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("fed", ["seed", "federation"], "federation"),
        ("LoRA", ["lora", "full"], "lora"),
        ("sampels", ["samples", "seed"], "samples"),
        ("xyz", ["samples", "seed"], None),
        ("x", [], None),
    ],
)
def test_the_nearest_word(word, known, meant):
    assert nearest(word, known) == meant


@pytest.mark.parametrize("override", ["seed=true", "llm.samples=true", "selection.fraction=true", "data.alpha=false"])
def test_true_is_no_number(write, override):
    with pytest.raises(ConfigError, match=r"must be no true or false, found (True|False)"):
        load(write(), (override,))
    assert load(write(), ("federation.closing=true",)).federation.closing


def test_labels_that_are_read_alike_are_one_label(write):
    with pytest.raises(ConfigError, match="labels must differ from each other"):
        load(write(lambda tables: tables["task"].update(labels=["good", "good ", "bad"])))


def test_what_is_dumped_loads_as_the_same_configuration(write, tmp_path):
    config = load(write())
    again = tmp_path / "again.toml"
    again.write_text(config.dump())
    assert load(again) == config


def test_a_later_version_whose_preset_sets_more_reads_the_same_of_a_run_that_was_made_before(
    write, tmp_path, monkeypatch
):
    config, kept = load(write()), tmp_path / "kept.toml"
    kept.write_text(config.dump().replace("gamma_anchor = 0.0\n", "").replace("weigh_judges = false\n", ""))
    later = {"llm": {"gamma_anchor": 0.5}, "slm": {"weigh_judges": True}}
    monkeypatch.setitem(PRESETS, config.preset, merged(PRESETS[config.preset], later))
    assert load(kept) == config
    assert load(kept, ("llm.gamma_anchor=0.25",)).llm.gamma_anchor == 0.25
    kept.write_text(kept.read_text().partition("\n")[2])  # a file by hand, with that preset under it
    assert (load(kept).llm.gamma_anchor, load(kept).slm.weigh_judges) == (0.5, True)


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_configuration_is_valid_and_goes_round(name, tmp_path):
    config = load(name)
    path = tmp_path / "again.toml"
    path.write_text(config.dump())
    assert load(path) == config
    assert config.task.labels
    assert config.evaluation.perplexity_text, "what the LLM forgets would not be measured"


def test_the_configurations_of_the_issue_are_there():
    assert {"demo", "sst2", "imdb", "ag_news", "yahoo_answers", "paper_sst2"} <= set(packaged())
    paper = load("paper_sst2")
    assert paper.llm.model == "openai-community/gpt2-large"
    assert [spec.model.split("/")[1] for spec in paper.slm.models] == ["bert-base-uncased", "distilbert-base-uncased"]


def test_the_paper_preset_is_the_paper(write):
    config = load(write(lambda tables: tables.update(preset="paper", llm={"model": "x"}, selection={})))
    assert (config.llm.gamma_generation, config.llm.gamma_language_modeling, config.llm.gamma_kl) == (1, 0.1, 0.05)
    assert config.selection.fraction == 0.25
    assert config.selection.nonpositive_rewards == "keep"
    assert not config.reward.correct_prior
    assert not config.selection.class_balance
    assert config.llm.token_reduction == "sum"
    assert (config.llm.gamma_generation, config.llm.gamma_language_modeling, config.llm.gamma_kl) == (1, 0.1, 0.05)
    assert config.llm.generation_floor == 0  # none
    assert config.reward.baseline == "none"
    assert config.slm.interpolation == 1
    assert config.selection.fraction == 0.25
    assert PRESETS["paper"] == {}


def test_recommended_is_the_default_and_the_file_goes_over_it(write):
    assert load(write()).reward.correct_prior
    assert load(write()).selection.class_balance
    assert not load(write(lambda tables: tables.update(reward={"correct_prior": False}))).reward.correct_prior


def test_the_preset_holds_for_a_configuration_made_in_python_too(settings):
    assert Config.model_validate(settings).reward.correct_prior
    assert not Config.model_validate({**settings, "preset": "paper"}).reward.correct_prior


def test_the_preset_lies_under_sections_made_in_python_too(settings):
    models = settings["slm"]["models"]
    slm = SLMConfig(models=models, synthetic=FitConfig(epochs=7))
    config = Config(**{**settings, "llm": LLMConfig(model="l"), "slm": slm, "reward": RewardConfig(teachers=2)})
    slm_table = {"models": models, "synthetic": {"epochs": 7}}
    tables = {"llm": {"model": "l"}, "slm": slm_table, "reward": {"teachers": 2}}
    assert config == Config.model_validate({**settings, **tables})
    assert (config.reward.correct_prior, config.slm.llm_judges, config.slm.synthetic.epochs) == (True, True, 7)
    private = Config(**{**settings, "privacy": PrivacyConfig(epsilon=8.0)})
    assert not private.acceptance.enabled


def test_full_fine_tuning_in_bfloat16_is_refused(write):
    for overrides in (("llm.adapter=full", "llm.dtype=bfloat16"), ("llm.dtype=bfloat16", "llm.adapter=full")):
        with pytest.raises(
            ConfigError,
            match=r'own.toml with --set llm\.\S+: llm: llm.adapter = "full" .*; found llm.dtype = "bfloat16"',
        ):
            load(write(), overrides)
    assert load(write(), ("llm.adapter=full", "llm.dtype=auto")).llm.dtype == "auto"
    assert load(write(), ("llm.adapter=lora", "llm.dtype=bfloat16")).llm.dtype == "bfloat16"


def test_overrides_are_toml_or_else_text(write):
    config = load(
        write(), ("llm.samples=3", "synthesis.stop=['x']", "name=other", "selection.nonpositive_rewards=drop")
    )
    assert (config.llm.samples, config.synthesis.stop, config.name) == (3, ("x",), "other")
    assert config.selection.nonpositive_rewards == "drop"


def test_the_data_folder_is_relative_to_the_file_or_given(write, tmp_path):
    path = write(lambda tables: tables["data"].update(dir="there"))
    assert load(path).data.dir == str(tmp_path / "there")
    assert load(path, data_dir=str(tmp_path / "elsewhere")).data.dir == str(tmp_path / "elsewhere")


def test_a_data_folder_that_is_set_is_relative_to_the_working_directory(write, tmp_path, monkeypatch):
    path = write(lambda tables: tables["data"].update(dir="there"))
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    assert load(path, ("data.dir=rows",)).data.dir == str(tmp_path / "working" / "rows")
    assert load(path, ("data.dir=~/rows",)).data.dir == str(Path.home() / "rows")
    assert load(path, ("data.dir=rows",), str(tmp_path / "elsewhere")).data.dir == str(tmp_path / "elsewhere")


def test_a_checked_configuration_cannot_be_changed(config):
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 4


def put(section, key, value):
    return lambda tables: tables[section].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("llm", "learning_rat", 1), r"own.toml: unknown key llm.learning_rat; did you mean 'learning_rate'\?"),
        (put("llm", "zzz", 1), r"unknown key llm.zzz; known keys: adapted_layers, adapter, anchors"),
        (lambda tables: tables["slm"]["private"].update(epoch=2), r"slm.private.epoch; did you mean 'epochs'\?"),
        (
            lambda tables: tables["slm"]["models"][0].update(modle="x"),
            r"unknown key slm.models.0.modle; did you mean 'model'",
        ),
        (lambda tables: tables.update(tusk={}), r"unknown key tusk; did you mean 'task'\?"),
        (lambda tables: tables.update(preset="papr"), r"preset: .*'paper' or 'recommended'.*did you mean 'paper'\?"),
        (put("selection", "fraction", 0), r"selection.fraction: .*greater than 0, found 0"),
        (put("selection", "fraction", 1.5), r"selection.fraction: .*less than or equal to 1, found 1.5"),
        (put("llm", "samples", "many"), r"llm.samples: .*valid integer.*found 'many'"),
        (lambda tables: tables["llm"].pop("model"), r"llm.model is missing"),
        (
            lambda tables: tables["task"]["verbalizer"].pop("bad"),
            r"task: verbalizer is missing for the label\(s\) \['bad'\]",
        ),
        (lambda tables: tables["task"]["prompt"].pop("good"), r"task: prompt is missing for the label\(s\) \['good'\]"),
        (
            lambda tables: tables["task"]["verbalizer"].update(bad=" "),
            r"task: verbalizer is missing for the label\(s\) \['bad'\], or blank",
        ),
        (
            lambda tables: tables["task"]["prompt"].update(good=["Write:", "\n"]),
            r"task: prompt is missing for the label\(s\) \['good'\], or blank",
        ),
        (
            lambda tables: tables["task"]["statement"].update(fair="x"),
            r"task: statement names \['fair'\], which are not",
        ),
        (put("task", "labels", ["bad", "bad"]), r"task: labels must differ"),
        (put("task", "query", "no place"), r"task: query must contain \{text\} exactly once"),
        (lambda tables: tables["data"].pop("test"), r"data: test must name a file"),
        (
            put("data", "label_column", "text"),
            r"data: text_column and label_column must be two columns, found 'text' for both",
        ),
        (lambda tables: tables["data"].pop("train"), r"either data.train .* or a \[\[clients\]\] table"),
        (lambda tables: tables.update(clients=[{"id": "a", "train": "x"}]), r"either data.train"),
        *(
            (lambda tables, name=name: tables.update(clients=[{"id": name, "train": "x"}]), rf"0: id must {why}")
            for name, why in (("mean", "not be 'mean'"), ("north.partial", "not end with '.partial'"))
        ),
        (lambda tables: tables.update(name="../up"), r"name: must start with a letter or digit, go on"),
        (put("llm", "learning_rate", float("nan")), r"llm.learning_rate: .*finite"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(write, change, message):
    with pytest.raises(ConfigError, match=message):
        load(write(change))


def test_all_errors_are_told_at_once(write):
    def change(tables):
        tables["llm"]["samples"] = 0
        tables["selection"]["poool"] = 3

    with pytest.raises(ConfigError) as caught:
        load(write(change))
    assert "llm.samples" in str(caught.value)
    assert "selection.poool" in str(caught.value)


@pytest.mark.parametrize("override", ["llm.samples", "=3", "llm.", "name.x=1"])
def test_an_override_that_cannot_be_is_refused(write, override):
    with pytest.raises(ConfigError, match="--set"):
        load(write(), (override,))


def test_a_file_of_an_editor_that_marks_utf8_is_read(write):
    path = write()
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load(path).name == "tiny"


def test_a_file_that_is_not_there_or_not_toml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the packaged ones are .*demo"):
        load("no such thing")
    (tmp_path / "broken.toml").write_text("a = = b")
    with pytest.raises(ConfigError, match="cannot be read as a TOML file"):
        load(tmp_path / "broken.toml")


def test_clients_must_have_different_ids(write):
    """Of folders, too, where a disk knows no capitals."""

    def change(tables):
        tables["data"].pop("train")
        tables["clients"] = [{"id": "a", "train": "x.csv"}, {"id": "A", "train": "y.csv"}]

    with pytest.raises(ConfigError, match=r"ids that differ by more than capitals, found \['a', 'A'\]"):
        load(write(change))


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ({"id": "mean", "train": "x.csv"}, "id must not be 'mean'"),
        ({"id": "a", "train": "x.csv", "num_hidden_layers": 2}, "num_hidden_layers needs a model"),
        ({"id": "a", "train": "x.csv", "pooling": "mean"}, "pooling needs a model"),
        ({"id": "a/b", "train": "x.csv"}, "clients.0.id"),
    ],
)
def test_a_client_that_cannot_be_is_refused(write, client, message):
    def change(tables):
        tables["data"].pop("train")
        tables["clients"] = [client]

    with pytest.raises(ConfigError, match=message):
        load(write(change))


def test_the_dump_holds_every_field(config):
    tables = tomllib.loads(config.dump())
    assert tables["llm"]["gamma_kl"] == 0.1  # the preset's
    assert tables["llm"]["generation_floor"] == 5.0
    assert set(tables["llm"]) == set(type(config.llm).model_fields)
    assert Config.model_validate(tables) == config


def test_a_preset_over_a_whole_file_is_refused(settings, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(Config.model_validate(settings).dump())
    with pytest.raises(ConfigError, match=r"preset=paper: .*config\.toml was written by a run and is whole"):
        load(path, ("preset=paper",))
    assert load(path, ("seed=3",)).seed == 3
