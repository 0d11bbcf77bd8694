"""report.py: one page that loads nothing, says what is absent, and takes no name for anything else."""
import base64
import html
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from commands import ROOT, evaluation
from harness import call, refusal, snapshot
from report_folder import write

SECTIONS = ["In short", "Metrics and baselines", "Accuracy by group", "Calibration of the probabilities",
            "Where the guesses are wrong", "Examples", "What the geo-encoder knows of distance",
            "Losses of the training", "Where this comes from"]
LOADING = ("href", "srcset", "action", "data", "background", "poster")
VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = '</td><script src="https://evil.example/{}.js">x()</script><img src=//evil.example onerror="x">\u202e&amp;'

FORMULA = r"$\frac{<b>"       # matplotlib takes it for a formula, and a broken one


class Reader(HTMLParser):
    """What a browser finds: tags with attributes, the text in headings, tables' cells; and that tags nest."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return [text for name, text in self.texts if name == tag]


def check_self_contained(page):
    """Nothing is loaded: no scripts, links or frames, every picture inlined and described."""
    found = Reader(page)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    assert found.all("a") in ([], [{"href": "explorer.html"}])      # beside it; a link is followed by whoever clicks
    for tag, attributes in found.tags:
        assert tag == "a" or not [name for name in attributes if name.startswith("on") or name in LOADING]
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/png;base64,") and attributes["alt"].strip()
    style, = found.text("style")
    assert "url(" not in style and "@import" not in style
    policy = next(meta for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"] and "script" not in policy["content"]
    assert any(meta.get("name") == "viewport" and "width=device-width" in meta["content"] for meta in found.all("meta"))
    return found


def absent(page):
    return re.findall(r'<p class="absent">Not shown: (.*?)</p>', page)


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """(root, the checkpoint's folder, the page, what the command said); its categories' names are hostile."""
    root = tmp_path_factory.mktemp("town")
    checkpoint = write(root, category=HOSTILE)
    found = json.loads((checkpoint / "metrics.json").read_text())
    found["all"][FORMULA] = found["all"]["popularity"]
    found["groups"][FORMULA] = {FORMULA: found["all"]}
    found["command"] = FORMULA
    (checkpoint / "metrics.json").write_text(json.dumps(found))
    result = call(root, "report.py", "--output_dir", checkpoint)
    assert result.code == 0, result.err
    return root, checkpoint, (checkpoint / "report/report.html").read_text(), result


def test_one_page_that_loads_nothing(town):
    _, checkpoint, page, result = town
    found = check_self_contained(page)
    assert found.text("h2") == SECTIONS and absent(page) == []
    pngs = {path.name: path.read_bytes() for path in (checkpoint / "report").glob("*.png")}
    inlined = [base64.b64decode(image["src"].partition(",")[2]) for image in found.all("img")]
    assert sorted(pngs.values()) == sorted(inlined) and all(png.startswith(b"\x89PNG") for png in inlined)
    assert f"wrote {checkpoint / 'report/report.html'} and {len(pngs)} pictures beside it" in result.out
    assert {"report_calibration.png", "report_errors_model.png", "report_errors_history.png", "report_groups_acc_5.png",
            "report_places_before.png", "report_distances_after.png", "report_loss_2.png", "report_example_6.png",
            "report_metrics.png"} <= set(pngs)
    assert sorted(path.name for path in (checkpoint / "report").iterdir()) == sorted(
        [*pngs, "report.html", "explorer.html"])


def test_names_of_strangers_are_text(town):
    page = town[2]
    assert "evil.example/7.js" in page and "<script" not in page and "\u202e" not in page
    assert "&lt;script src=&quot;https://evil.example/7.js&quot;&gt;" in page and "&amp;amp;" in page
    assert page.count("frac{&lt;b&gt;") >= 4 and "<b>" not in page


def test_what_it_says(town):
    """Six of twelve right; the history's guess is 1, right in the first pair alone."""
    found = Reader(town[2])
    bullets = " ".join(found.text("li"))
    assert "Acc@1 0.5000 [" in bullets and "reaches 0.0833 [" in bullets and "Acc@1 differs by +0.4167 [" in bullets
    assert "The model is better than that count" in bullets
    cells = found.text("td")
    assert cells[0] == "12" and cells[1].startswith("0.5000 [")
    assert any("First guesses: 6 right, 3 near misses" in text and "3 far misses" in text for text in found.text("p"))
    # 0.9 + 0.35 + 0.8 + … of PROBABILITIES, over 12 pairs
    assert any("gives its first guess 57.1 %, and 50.0 % [" in text for text in found.text("p"))
    assert [text.partition(":")[0] for text in found.text("h3") if ": pair" in text] == [
        "Right", "Right", "Near miss", "Near miss", "Far miss", "Far miss"]


def test_the_same_bytes_again_and_nothing_left_of_before(town):
    root, checkpoint, page, _ = town
    report = checkpoint / "report"
    before = snapshot(report)
    (report / "report_example_9.png").write_bytes(b"of an earlier report")
    (report / "mine.png").write_bytes(b"not the report's")
    assert call(root, "report.py", "--output_dir", checkpoint).code == 0
    (report / "mine.png").unlink()
    assert snapshot(report) == before and (report / "report.html").read_text() == page


def test_what_is_absent_is_one_line(tmp_path, no_pictures):
    """Neither encoder, nor logs, nor the data set: the metrics and groups are shown all the same, the rest is named."""
    checkpoint = write(tmp_path, encoder=False)
    (tmp_path / "stage2/trainer_log.jsonl").unlink()
    shutil.rmtree(tmp_path / "stage1")
    shutil.rmtree(tmp_path / "datasets")
    result = call(tmp_path, "report.py", "--output_dir", checkpoint, "--report_dir", tmp_path / "page")
    assert result.code == 0, result.err
    page = (tmp_path / "page/report.html").read_text()
    found, lines = check_self_contained(page), absent(page)
    assert found.text("h2") == SECTIONS and len(lines) == 5
    assert all("town_gps_mapping.csv; give --gps_mapping_path" in line for line in lines[:4])
    assert lines[4].startswith("there is no trainer_log.jsonl") and not (checkpoint / "report").exists()
    assert "Acc@1 0.5000 [" in page


@pytest.mark.parametrize("changes, said, source", [
    ({}, None, "its own, not normalised"),
    ({"average_with": "[]"}, None, "its own, not normalised"),
    ({"average_with": "['A.npy']"}, "a mixture here: the mean of its probabilities and of ['A.npy'].", "the mixture's"),
])
def test_what_the_probabilities_are(tmp_path, no_pictures, changes, said, source):
    checkpoint = write(tmp_path)
    found = json.loads((checkpoint / "metrics.json").read_text())
    found["settings"] |= changes
    (checkpoint / "metrics.json").write_text(json.dumps(found))
    assert call(tmp_path, "report.py", "--output_dir", checkpoint).code == 0
    text = html.unescape((checkpoint / "report/report.html").read_text())
    assert f"The model's probabilities are {source}" in text
    assert (said in text) if said else ("a mixture here" not in text)


def test_where_a_checkpoint_comes_from(tmp_path, no_pictures):
    """Of several starts of a training the one that came to it, not the last."""
    checkpoint = write(tmp_path)
    starts = [{"from_step": step, "seed": 42, "command": name}
              for step, name in ((0, "run A"), (2, "run B"), (4, "run C"))]
    (checkpoint.parent / "run.json").write_text(json.dumps({"starts": starts}))
    assert call(tmp_path, "report.py", "--output_dir", checkpoint).code == 0
    page = (checkpoint / "report/report.html").read_text()
    assert "run B" in page and "run C" not in page and "run A" not in page


def test_an_answer_without_probabilities_has_no_calibration(tmp_path, no_pictures):
    """--decoding sample; and a test without an encoder."""
    checkpoint = write(tmp_path, encoder=False)
    records = [json.loads(line) for line in (checkpoint / "predictions.jsonl").open()]
    for record in records:
        record["top"] = [[record["top"][0][0], None]]
        record["rank"] = 1 if record["rank"] == 1 else None
    (checkpoint / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = call(tmp_path, "report.py", "--output_dir", checkpoint)
    assert result.code == 0, result.err
    lines = absent((checkpoint / "report/report.html").read_text())
    assert len(lines) == 2 and "no log-probabilities" in lines[0] and "give --geoencoder_path" in lines[1]


@pytest.mark.parametrize("spoil, names", [
    (lambda root, checkpoint: shutil.rmtree(checkpoint), ["--output_dir"]),
    (lambda root, checkpoint: (checkpoint / "metrics.json").unlink(), ["metrics.json", "test_next_gps.py"]),
    (lambda root, checkpoint: (checkpoint / "metrics.json").write_text("{"), ["metrics.json", "not JSON"]),
    (lambda root, checkpoint: (checkpoint / "metrics.json").write_text(json.dumps(
        {**json.loads((checkpoint / "metrics.json").read_text()), "settings": [1]})), ["metrics.json", "settings"]),
    (lambda root, checkpoint: (checkpoint / "metrics.json").write_text(
        (checkpoint / "metrics.json").read_text().replace('"town"', '"../town"')), ["metrics.json", "dataset_name"]),
    (lambda root, checkpoint: (checkpoint / "predictions.jsonl").write_text("{}\n"), ["predictions.jsonl, line 1"]),
    (lambda root, checkpoint: next(root.rglob("test_qa_*")).write_text("<question>: POI id 1 <answer>: POI id 2.\n"),
     ["test_qa_pairs", "line 1", "--data_path"]),
    (lambda root, checkpoint: next(root.rglob("train_sample.csv")).write_text("UserId,PoiId,TrajectoryId\n0,7,1\n"),
     ["train_sample.csv", "metrics.json"]),
    (lambda root, checkpoint: next(root.rglob("town_gps_mapping.csv")).write_text("GPS_id\n1\n"),
     ["town_gps_mapping.csv"]),
    (lambda root, checkpoint: next(root.rglob("geo_encoder_merged.pth")).write_text("?"), ["geo_encoder_merged.pth"]),
    (lambda root, checkpoint: (root / "stage2/trainer_log.jsonl").write_text("?\n"), ["trainer_log.jsonl, line 1"])],
    ids=["no folder", "no metrics", "metrics cut off", "no settings", "a path for a name", "predictions",
         "other questions", "other train", "mapping", "encoder", "log"])
def test_a_mistake_is_one_line(tmp_path, no_pictures, spoil, names):
    """Before anything is written."""
    checkpoint = write(tmp_path)
    spoil(tmp_path, checkpoint)
    refusal(call(tmp_path, "report.py", "--output_dir", checkpoint), *names)
    assert not (checkpoint / "report").exists()


@pytest.mark.parametrize("flags, name", [([], "--output_dir"), (["--geoencoder_path", "gone.pth"], "gone.pth"),
                                         (["--gps_mapping_path", "gone.csv"], "gone.csv"),
                                         (["--report_dir", "metrics.json"], "metrics.json")])
def test_wrong_flags_are_one_line(town, flags, name):
    root, checkpoint, *_ = town
    given = ["--output_dir", checkpoint, *flags] if flags else []
    refusal(call(checkpoint, "report.py", *given), name)


def test_of_a_real_chain(repo):
    """Trained, tested, reported: by the paths that the test's settings name."""
    checkpoint = "outputs/llm/checkpoint-6"
    assert call(repo, *evaluation(checkpoint, "--limit", "8", "--test_type", "llm")).code == 0
    result = call(repo, "report.py", "--output_dir", f"{checkpoint}/limit8", "--report_dir", "outputs/report")
    assert result.code == 0, result.err
    page = (repo / "outputs/report/report.html").read_text()
    found = check_self_contained(page)
    assert absent(page) == [] and "sample, 8 test pairs" in found.text("h1")[0]
    assert {"Stage 1: the geo-encoder (GCIM)", "Stage 2: the LLM"} <= set(found.text("h3"))
    assert "wrote outputs/report/explorer.html\n" in result.out
    assert "Explorer: sample, 8 test pairs" in (repo / "outputs/report/explorer.html").read_text(encoding="utf-8")
    shutil.rmtree(repo / "outputs/report")


def test_the_demo_ends_with_both_pages():
    *_, last = (ROOT / "demo.sh").read_text(encoding="utf-8").splitlines()
    assert last == "python report.py --output_dir runs/demo/pointer/checkpoint-$STEPS_0"
