"""python -m mpiml predict: tables and images in, predictions out, the same on any number of ranks; and what it refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest
from launch import environment, mpirun

from mpiml import data
from mpiml.data import Features, Labels, Number, Table, TextFeatures, pixels, read_csv
from mpiml.nn import EmbeddingBag, Flatten, Linear, Sequential
from mpiml.ops import relu
from mpiml.predict import INPUTS, Images, predict
from mpiml.random import generator

pytest.importorskip("safetensors")
from mpiml.save import load_model, save

pytestmark = pytest.mark.launch

NEW = """\ufeffid,age,"job, or none",note
1,30,clerk,"a ""quoted"", note"
2, 41.5 ,smith,
3,?,NA,two
lines
4,-7,,"1,5"
"""
NEW = NEW.replace("two\nlines", '"two\nlines"')


def model_of(path, target, outputs, **options):
    """Save a model of two columns, age and job, with weights that nobody trained."""
    rng = generator(0, "rows")
    rows = "".join(f"{rng.integers(20, 70)},{job}\n" for job in ["clerk", "smith", ""] * 10)
    path.with_suffix(".train.csv").write_text('age,"job, or none"\n' + rows)
    features = Features.fit(read_csv(path.with_suffix(".train.csv")))
    model = Sequential(Linear(len(features.names), 8), relu, Linear(8, 8), relu, Linear(8, outputs)).init(seed=1)
    save(model, path, {"input": features.settings(), "target": target and target.settings()} | options)
    return model, features


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a classifier, a regression and new rows; it becomes the working folder."""
    model_of(tmp_path / "classes.safetensors", Labels("income", ["<=50K", ">50K", "ünknown"]), 3)
    model_of(tmp_path / "number.safetensors", Number("mass", 4201.75, 801.9), 1)
    (tmp_path / "new.csv").write_text(NEW, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(path):
    table = read_csv(path, missing=())
    columns = [table[name].tolist() for name in table.names]
    return [dict(zip(table.names, row, strict=True)) for row in zip(*columns, strict=True)]


def test_classes_of_a_table(files):
    predict("classes.safetensors", "new.csv", "out.csv")
    found = rows_of("out.csv")
    assert [row["id"] for row in found] == ["1", "2", "3", "4"]
    assert [row["note"] for row in found] == ['a "quoted", note', "", "two\nlines", "1,5"]
    assert [row["job, or none"] for row in found] == ["clerk", "smith", "NA", ""]  # as they were
    model, about = load_model("classes.safetensors")
    logits = model(Features.from_settings(about["input"]).encode(read_csv("new.csv")))
    classes = ["<=50K", ">50K", "ünknown"]
    e = np.exp(logits)
    for row, probabilities in zip(found, e / e.sum(axis=1, keepdims=True), strict=True):
        assert row["predicted income"] == classes[probabilities.argmax()]
        np.testing.assert_allclose([float(row[f"probability {name}"]) for name in classes], probabilities, rtol=1e-4)


def test_numbers_of_a_table(files):
    predict("number.safetensors", "new.csv", "out.csv", only=True)
    predict("number.safetensors", "new.csv", "out.npy")
    found = rows_of("out.csv")
    assert all(row.keys() == {"predicted mass"} for row in found)
    model, about = load_model("number.safetensors")
    values = 4201.75 + 801.9 * model(Features.from_settings(about["input"]).encode(read_csv("new.csv")))[:, 0].astype(float)
    np.testing.assert_allclose([float(row["predicted mass"]) for row in found], values, rtol=1e-8)
    np.testing.assert_allclose(np.load("out.npy"), values, rtol=1e-12)


def test_one_logit_for_two_classes(files):
    model_of(files / "two.safetensors", Labels("ill", ["no", "yes"]), 1)
    predict("two.safetensors", "new.csv", "out.csv")
    for row in rows_of("out.csv"):
        no, yes = float(row["probability no"]), float(row["probability yes"])
        assert no + yes == pytest.approx(1, abs=1e-5) and row["predicted ill"] == ("yes" if yes > no else "no")


def test_a_model_of_float64_without_a_target(files):
    train = read_csv(files / "number.train.csv")
    features = Features.fit(train)
    model = Sequential(Linear(len(features.names), 2)).init(seed=1, dtype=np.float64)
    save(model, "raw.safetensors", {"input": features.settings()})
    predict("raw.safetensors", "new.csv", "out.npy")
    x = features.encode(read_csv("new.csv")).astype(np.float64)
    np.testing.assert_array_equal(np.load("out.npy"), model(x))
    predict("raw.safetensors", "new.csv", "out.csv", only=True)
    np.testing.assert_allclose(np.loadtxt("out.csv", delimiter=",", skiprows=1), model(x), rtol=1e-8)


def test_texts(files):
    table = Table({"title": ["rain in rome", "sun in oslo"], "kind": ["bad", "good"]})
    features, labels = TextFeatures.fit(table, ["title"], length=4), Labels.fit(table, "kind")
    model = Sequential(EmbeddingBag(len(features.vocabulary), 3), Linear(3, 2)).init(seed=1)
    save(model, "texts.safetensors", {"input": features.settings(), "target": labels.settings()})
    (files / "texts.csv").write_text('title,page\n"Sun, \nand never rain",1\n,2\nfog,3\n')
    predict("texts.safetensors", "texts.csv", "out.csv")
    found = model(features.encode(Table({"title": ["Sun, and never rain", "", "fog"]})))
    assert [row["page"] for row in rows_of("out.csv")] == ["1", "2", "3"]
    assert [row["predicted kind"] for row in rows_of("out.csv")] == labels.decode(found)
    refused("column 'title'", "texts.safetensors", "new.csv")


@pytest.mark.parametrize("text", [
    "30,x,clerk,yes\n41,y,smith,no\n", "30,x,clerk\n41,y,smith\n", "job,age\nclerk,30\nsmith,41\n",
    "\ufeff\nage,town,job,ill\n30,x,clerk,?\n41,y,smith,?\n"])
def test_files_that_had_no_header(text, files):
    (files / "train.csv").write_text("30,x,clerk,yes\n50,y,smith,no\n")
    reading = {"names": ["age", "town", "job", "ill"], "missing": ["none"]}
    table = read_csv("train.csv", **reading)
    features, target = Features.fit(table, without=["ill", "town"]), Labels.fit(table, "ill")
    model = Sequential(Linear(len(features.names), 2)).init()
    save(model, "model.safetensors", {"input": features.settings(), "target": target.settings(), "csv": reading})
    (files / "text.csv").write_text(text)
    predict("model.safetensors", "text.csv", "out.csv")
    found = rows_of("out.csv")
    assert [(row["age"], row["job"]) for row in found] == [("30", "clerk"), ("41", "smith")]
    (files / "same.csv").write_text("job,age\nclerk,30\nsmith,41\n")
    predict("model.safetensors", "same.csv", "same.out", only=True)
    assert [row["probability yes"] for row in rows_of("same.out")] == [row["probability yes"] for row in found]


@pytest.fixture
def images(files):
    model = Sequential(Flatten(), Linear(12, 10)).init(seed=2)
    about = {"input": {"kind": "pixels", "shape": [1, 3, 4]}, "target": Labels("digit", map(str, range(10))).settings()}
    save(model, "digits.safetensors", about)
    x = generator(3, "images").integers(0, 256, (700, 1, 3, 4)).astype(np.uint8)
    np.save("x.npy", x)
    return model, x


@pytest.mark.parametrize("kind", [kind for kind, encoder in INPUTS.items() if encoder is Images])
def test_every_kind_of_images(kind, files):
    prepare = getattr(data, kind)
    x = generator(5, kind).integers(0, 256, (3, 3, 8, 8)).astype(np.uint8)
    model = Sequential(Flatten(), Linear(192, 4)).init()
    save(model, "model.safetensors", {"input": {"kind": kind, "shape": x.shape[1:]}})
    np.save("x.npy", x)
    predict("model.safetensors", "x.npy", "out.npy")
    np.testing.assert_array_equal(np.load("out.npy"), model(prepare(x)))


def test_images(images):
    model, x = images
    predict("digits.safetensors", "x.npy", "out.npy")
    logits = np.concatenate([model(pixels(x[start:start + 256])) for start in range(0, 700, 256)])
    e = np.exp(logits)
    np.testing.assert_allclose(np.load("out.npy"), e / e.sum(axis=1, keepdims=True), rtol=1e-4)
    np.save("without channels.npy", x[:, 0])
    predict("digits.safetensors", "without channels.npy", "other.npy")
    np.testing.assert_array_equal(np.load("other.npy"), np.load("out.npy"))
    predict("digits.safetensors", "x.npy", "out.csv")
    assert [int(row["predicted digit"]) for row in rows_of("out.csv")] == logits.argmax(axis=1).tolist()


def test_a_model_that_says_nothing_takes_arrays(files):
    model = Sequential(Linear(3, 2)).init()
    save(model, "bare.safetensors", {})
    x = np.arange(6.0).reshape(2, 3)
    np.save("x.npy", x)
    predict("bare.safetensors", "x.npy", "out.npy")
    np.testing.assert_array_equal(np.load("out.npy"), model(x.astype(np.float32)))


# --- Any number of ranks ----------------------------------------------------------------------------------------------

def command(*words, ranks=1, **options):
    return mpirun(ranks, "-m", "mpiml", "predict", *map(str, words), timeout=60, **options)


def many_rows(path, n):
    rng = generator(4, "many")
    jobs = ["clerk", "smith", "", '"clerk"']
    path.write_text('id,age,"job, or none",note\n' + "".join(
        f'{i},{rng.uniform(20, 70):.3f},{jobs[rng.integers(4)]},"line one\nline ""{i}"""\n' for i in range(n)))


@pytest.mark.parametrize("n", [3, 1000])
def test_the_same_bytes_on_any_number_of_ranks(n, files):
    many_rows(files / "many.csv", n)
    predict(str(files / "classes.safetensors"), str(files / "many.csv"), "one.csv")
    expected = (files / "one.csv").read_bytes()
    assert len(rows_of("one.csv")) == n
    for ranks, pipe in ((2, 1), (3, 1), (4, 2)) if n == 1000 else ((4, 1),):
        out = files / f"{ranks}-{pipe}.csv"
        run = command(files / "classes.safetensors", files / "many.csv", "--out", out, "--pipe", pipe, ranks=ranks)
        assert (run.code, run.err) == (0, "")
        assert out.read_bytes() == expected, f"{ranks} ranks, {pipe} stages"


def test_images_on_many_ranks_to_the_standard_output(images, files):
    predict("digits.safetensors", "x.npy", "one.csv")
    predict("digits.safetensors", "x.npy", "one.npy")
    run = command(files / "digits.safetensors", files / "x.npy", "--out", files / "three.npy", ranks=3)
    assert run.code == 0 and (files / "three.npy").read_bytes() == (files / "one.npy").read_bytes()
    run = command(files / "digits.safetensors", files / "x.npy", "--pipe", "2", ranks=2)
    assert run.code == 0 and run.out == (files / "one.csv").read_text()


def test_without_mpi(files):
    code = ("import sys; sys.modules['mpi4py'] = None; sys.argv = ['mpiml', 'predict', 'classes.safetensors', 'new.csv']; "
            "from mpiml.__main__ import main; main()")
    predict("classes.safetensors", "new.csv", "out.csv")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, cwd=files,
                         env=environment(PYTHONIOENCODING="ascii", PYTHONPATH=os.pathsep.join(sys.path)))
    assert (run.returncode, run.stderr) == (0, b"") and run.stdout == (files / "out.csv").read_bytes()


# --- What is refused --------------------------------------------------------------------------------------------------

def refused(message, *args, error=ValueError, **options):
    before = sorted(os.listdir())
    with pytest.raises(error, match=message):
        predict(*args, **options)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("text, message", [
    (NEW.replace("clerk", "pilot"), "line 2, column job, or none: 'pilot' is none of the 3 known values: .*clerk, smith"),
    (NEW.replace("-7", "old"), r"new\.csv, line 6, column age: 'old' is not a number"),
    (NEW.replace("age", "years"), r"new\.csv lacks the column age; it has id, years, job, or none, note"),
    (NEW + "5,20\n", r"new\.csv, line 7 has 2 fields, but there are 4 columns"),
    (NEW.replace('"two', "two"), r"new\.csv, line 4 has 4 fields|new\.csv, line 5"), ("", r"new\.csv is empty"),
    ("id,age,job\n", r"new\.csv has a header, but no rows"),
    (NEW.replace(",note", ",predicted income"), "the data have a column 'predicted income' themselves: rename it"),
])
def test_dirty_tables(text, message, files):
    (files / "new.csv").write_text(text, encoding="utf-8")
    refused(message, "classes.safetensors", "new.csv", "out.csv")


def test_files_that_are_not_there_or_in_the_way(files):
    refused("No such file or directory: 'none.csv'", "classes.safetensors", "none.csv", error=FileNotFoundError)
    refused("No such file or directory: 'none'", "none", "new.csv", error=FileNotFoundError)
    refused("cannot write no/out: there is no folder no", "classes.safetensors", "new.csv", "no/out", error=FileNotFoundError)
    for path, what in (str(files), "folder"), ("/dev/null", "device"):
        refused(f"it is a {what}, not a file", "classes.safetensors", "new.csv", path, force=True)
    (files / "out.csv").write_text("mine")
    refused("out.csv exists already: --force replaces it", "classes.safetensors", "new.csv", "out.csv", error=FileExistsError)
    for path in "new.csv", "./new.csv", "classes.safetensors":
        refused("is what is read: write the predictions to another file", "classes.safetensors", "new.csv", path, force=True)
    (files / "link").symlink_to("out.csv")
    predict("classes.safetensors", "new.csv", "link", force=True)
    assert len(rows_of("out.csv")) == 4 and (files / "link").is_symlink()
    refused("a pipeline of 2 stages takes 2 ranks: mpirun -n 2", "classes.safetensors", "new.csv", pipe=2)


def test_data_of_another_kind(images, files):
    _, x = images
    refused(r"takes the rows of a table: a CSV file, not x\.npy", "classes.safetensors", "x.npy")
    refused(r"does not say how rows of a table .* a file that ends in \.npy, not new\.csv", "digits.safetensors", "new.csv")
    (files / "new.npy").write_text(NEW)
    refused(r"new\.npy is no \.npy file of numbers", "digits.safetensors", "new.npy")
    save(Sequential(Linear(4, 2)).init(), "bare.safetensors", {})
    for array, message in [
        (x.astype(np.float32), r"holds float32 of shape \(700, 1, 3, 4\), but .* uint8, of shape \(n, 1, 3, 4\)"),
        (x.reshape(700, 12), r"holds uint8 of shape \(700, 12\), but .* of shape \(n, 1, 3, 4\)"),
        (x[:0], r"has no samples: it holds an array of shape \(0, 1, 3, 4\)"),
        (np.array([None]), "is no .npy file of numbers")]:
        np.save("other.npy", array, allow_pickle=True)
        refused(message, "digits.safetensors", "other.npy")
    for array, message in [(np.zeros((2, 3)), "linear takes 4 features"), (np.zeros((2, 4), int), "float"),
                           (np.array([["a"]]), "holds <U1, but a model takes floats or integers"),
                           (np.full((2, 4), np.nan), r"other\.npy, sample 0: the model's output is not finite")]:
        np.save("other.npy", array)
        refused(message, "bare.safetensors", "other.npy")
    (files / "cut.npy").write_bytes((files / "x.npy").read_bytes()[:-1])
    refused(r"cut\.npy is no \.npy file of numbers", "digits.safetensors", "cut.npy")


@pytest.mark.parametrize("about, message", [
    ({"input": {"kind": "sound"}}, "has an entry 'input' of the kind 'sound', but this version of mpiml knows table, text,"),
    ({"input": {"kind": "table"}}, "has an entry 'input' that cannot be used: KeyError: 'columns'"),
    ({"input": 3}, "has an entry 'input' of the kind 3"), ({"csv": {"ragged": "drop"}}, "has an entry 'csv' that is"),
    ({"csv": ["names"]}, "has an entry 'csv' that is .* instead of some of names, header"),
    ({"target": {"kind": "classes"}}, "has an entry 'target' that cannot be used: KeyError"),
])
def test_what_a_file_says_is_checked(about, message, files):
    save(Sequential(Linear(3, 2)).init(), "model.safetensors", about)
    np.save("x.npy", np.zeros((2, 3), np.float32))
    refused(message, "model.safetensors", "x.npy")


def test_outputs_that_do_not_fit_the_target(files):
    model_of(files / "model.safetensors", Labels("income", ["low", "high"]), 3)
    refused("has 3 outputs for a row, but income has 2 classes", "model.safetensors", "new.csv")
    model_of(files / "model.safetensors", Number("mass"), 2)
    refused("has 2 outputs for a row, but predicts one number, mass", "model.safetensors", "new.csv")


def test_many_ranks_say_it_once(files):
    many_rows(files / "many.csv", 100)
    text = (files / "many.csv").read_text().splitlines(keepends=True)
    text[151] = text[151].replace("line", "x").replace(",", ",unknown job,", 1)
    (files / "many.csv").write_text("".join(text))
    run = command(files / "classes.safetensors", files / "many.csv", "--out", files / "out.csv", ranks=3)
    assert run.code == 1 and run.err.count("mpiml: ") == 1 and "Traceback" not in run.err and "many.csv, line 15" in run.err
    run = command(files / "classes.safetensors", files / "new.csv", "--pipe", "2", ranks=3)
    assert run.code == 1 and run.err.startswith("mpiml: a grid of pipe=2 needs a multiple of 2 processes") and not run.left
    assert not (files / "out.csv").exists()
