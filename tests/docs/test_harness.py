"""The tests of pages fail where a page is wrong: planted pages with one mistake each, and the same pages without it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import PageError, read_page
from tests.docs.command_lines import commands_of, problems_of, script_of
from tests.docs.python_shim import with_settings
from tests.docs.session import Session


def write(folder: Path, text: str, name: str = "page.md") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return path


def shell(folder: Path, *lines: str) -> Path:
    return write(folder, "# Page\n\n```bash\n" + "\n".join(lines) + "\n```\n")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as running:
        yield running


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("python deepy.py train.py configs/metala-quickstart.yml --no-such-flag", "--no-such-flag"),
        ("python tools/data.py inspect --data-path x --flagg", "--flagg"),
        ("python tools/data.py look --data-path x", "look"),
        ("python tools/datasets/preprocess_data.py --input x --output-prefix y", "--tokenizer-type"),
        ("python tools/no_such_tool.py", "there is no script tools/no_such_tool.py"),
        ("python -m tests.no_such_module", "there is no module tests.no_such_module"),
        ("python train.py configs/no-such.yml", "there is no configuration configs/no-such.yml"),
        ("python train.py configs/metala-quickstart.yml --set train_iter=3", "train_iter"),
        ("python eval.py configs/metala-quickstart.yml --set train_iters=many", "train_iters"),
        ("cd x && FOO=1 torchrun --nproc_per_node 2 train.py configs/metala-quickstart.yml --oops", "--oops"),
        ("linear-neox trian configs/metala-quickstart.yml", "linear-neox trian"),
        ("linear-neox data inspect --data-path x --oops", "--oops"),
        ("make trian", "no target trian"),
        ("python deepy.py train.py configs/metala-quickstart.yml \\\n    --oops  # a comment", "--oops"),
    ],
)
def test_a_command_that_does_not_exist(line: str, problem: str, tmp_path: Path) -> None:
    (text,) = problems_of(read_page(shell(tmp_path, "echo fine", line)))
    assert problem in text and ":5: " in text


def test_commands_that_exist(tmp_path: Path) -> None:
    page = shell(
        tmp_path,
        "cp configs/metala-quickstart.yml configs/mine.yml  # it's fine",
        "python deepy.py train.py configs/mine.yml --set train_iters=3 \\",
        "    --set optimizer.params.lr=1e-3 --num_gpus 2 --print-launch",
        "srun python train.py configs/metala-1b.yml configs/local_setup.yml",
        "python tools/data.py inspect --data-path data/x --histogram x.png | tee log.txt && ls",
        "linear-neox checkpoint verify runs/x; make train",
        "cat > new.py <<'END'",
        "print('python tools/none.py')",
        "END",
        "python new.py",
        "python -m json.tool < x.json",
    )
    assert problems_of(read_page(page)) == []
    scripts = [script_of(command.words) for command in commands_of(read_page(page).blocks[0])]
    assert [script[0] for script in scripts if script] == [
        *("deepy.py", "train.py", "tools/data.py", "linear-neox", "make", "new.py"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- run -->\n\n```bash\nls\n```\n", "not on the line before"),
        ("<!-- Run -->\n```bash\nls\n```\n", "unknown comment"),
        ("<!-- run train_iters=4 -->\n```bash\nls\n```\n", "unknown comment"),
        ("<!-- run: train_iters -->\n```bash\nls\n```\n", "is not KEY=VALUE"),
        ("<!-- run -->\n```yaml\na: 1\n```\n", "cannot run"),
        ("<!-- output -->\n```\na\n```\n", "no block runs before"),
        ("```bash\nls\n", "not closed"),
        ("<!-- after: none.md -->\n", "there is no page"),
    ],
)
def test_a_comment_that_says_nothing(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PageError, match=message):
        read_page(write(tmp_path, text))


def test_settings_go_to_training_commands(tmp_path: Path) -> None:
    sets = ["train_iters=4", "attention_config=[[[metala], 2]]"]
    tail = ["--set", sets[0], "--set", sets[1]]
    for words in (["deepy.py", "train.py", "a.yml"], ["./train.py", "a.yml"], ["-m", "linear_neox", "train", "a.yml"]):
        assert with_settings(words, sets) == words + tail
    for words in (["generate.py", "a.yml"], ["deepy.py", "train.py", "a.yml", "--dry-run"], ["train.py", "--explain", "lr"]):
        assert with_settings(words, sets) == words
    page = "<!-- run: train_iters=4, attention_config=[[[metala], 2]] -->\n```bash\nls\n```\n"
    assert list(read_page(write(tmp_path, page)).blocks[0].settings) == sets


GOOD = """
    # Page

    <!-- setup: echo three > hidden.txt -->
    Shown:

    <!-- run -->
    ```bash
    value=7
    cat hidden.txt
    python - <<'END'
    import sys
    print("step 12 of 40, loss 3.25")
    print("on stderr", file=sys.stderr)
    END
    ```

    <!-- output: any numbers -->
    ```
    three
    ...
    step 99 of 1,000,   loss 0.5
    ```

    1. In a list:

       <!-- run -->
       ```python
       from pathlib import Path

       assert Path("megatron/assemble.py").is_file() and not Path("runs").exists()
       print("Python runs as well")
       ```

       <!-- run -->
       ```bash
       test $value = 7 && python -c 'import sys; print("word:", sys.argv[1:], sys.prefix)' a "b c"
       ! python -c 'raise SystemExit(5)'
       ```

       <!-- output -->
       ```
       word: ['a', 'b c'] /...
       ```
"""


@pytest.mark.slow
def test_a_page_that_is_right(tmp_path: Path, session: Session) -> None:
    result = session.run(read_page(write(tmp_path, GOOD)))
    assert result.failure == ""
    assert [output.count("\n") for output in result.outputs.values()] == [3, 1, 1]
    follower = "<!-- after: page.md -->\n<!-- run -->\n```bash\ngrep three hidden.txt\necho one > runs\n```\n"
    assert session.run(read_page(write(tmp_path, follower, "next.md"))).failure == ""
    assert not (result.folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "place"),
    [
        ("cat hidden.txt", "cat hidden.text", "page.md:9: exit code 1: cat hidden.text"),
        ("cat hidden.txt", "cat hidden.text | sort", "page.md:9: exit code 1: cat hidden.text | sort"),
        ("cat hidden.txt", "echo $undefined", "page.md:9: exit code 1"),
        ("cat hidden.txt", "echo 'open", "page.md:"),
        ("! python -c", "python -c", "page.md:37: exit code 5"),
        ('print("step 12', 'raise ValueError("step 12', "page.md:10: exit code 1"),
        ("from pathlib", "from pathlibb", "page.md:27: exit code 1"),
        ("three\n    ...", "four\n    ...", "page.md:19: no line of the block before is 'four'"),
        ("loss 0.5", "loss 0.5!", "page.md:21: no line of the block before is 'step 99 of 1,000,   loss 0.5!'"),
        ("'b c'] /", "'b d'] /", "page.md:42: no line of the block before"),
    ],
)
def test_a_page_that_is_wrong(right: str, wrong: str, place: str, tmp_path: Path, session: Session) -> None:
    assert right in GOOD
    failure = session.run(read_page(write(tmp_path, GOOD.replace(right, wrong, 1)))).failure
    assert place in failure


@pytest.mark.slow
def test_changed_sources_get_a_new_interpreter(tmp_path: Path, session: Session) -> None:
    """The preloaded process has the checkout's modules: a page that changes the sources of its folder must not run on them."""
    text = "import megatron.errors as e, sys; print(e.ConfigError.exit_code, 'torch' in sys.modules)"
    page = shell(
        tmp_path, f'python -c "{text}"', "sed -i 's/exit_code = 2/exit_code = 99/' megatron/errors.py", f'python -c "{text}"'
    )
    page.write_text(page.read_text().replace("```bash", "<!-- run -->\n```bash"))
    (output,) = session.run(read_page(page)).outputs.values()
    assert output.splitlines() == ["2 True", "99 False"]
