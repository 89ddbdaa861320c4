"""Tokenizers of the `tokenizers` library: a JSON file, GPT-2's pair of files, or a Hugging Face folder.

A `tokenizer.json` also stores how its last user called it. Only what maps a text to its ids is taken from it: truncation would
cut documents, padding would fill them, and the dropout of byte pairs would give other ids at every call. They are switched off
when the file is read and named in `remarks`; the template (the post-processor) is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.data.tokenizer_base import EOD_TEXT, MOST_IDS, PAD_TEXT, Template, Tokenizer, unreadable
from megatron.errors import DataError
from megatron.files import read_json


class HFTokenizer(Tokenizer):
    """A JSON file of the `tokenizers` library (NeoX's `HFTokenizer`: Pythia, GPT-NeoX-20B)."""

    name = "HFTokenizer"

    def __init__(self, vocab_file: Path) -> None:
        super().__init__([vocab_file])
        self._take(_read(vocab_file))

    def _take(self, backend: Any, eod_text: str = EOD_TEXT, pad_text: str = PAD_TEXT) -> None:
        """Use `backend`, made from the first of the files."""
        self._backend, self._eod_text, self._pad_text = backend, eod_text, pad_text
        self._switched_off = _switch_off(backend)
        self.template = _template_of(backend, self._files[0])
        _refuse_shared_ids(backend, self._files[0])
        self._count = int(backend.get_vocab_size(with_added_tokens=True))
        self._size = max([self._count, *(number + 1 for number in backend.get_vocab(with_added_tokens=True).values())])
        if self._size > MOST_IDS:
            why = f"at most {MOST_IDS:,} ids are used: each is a row of the embedding"
            raise DataError(f"a token has the id {self._size - 1}", where=str(self._files[0]), why=why)

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, added special tokens included."""
        return self._size

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        token = self._backend.token_to_id(self._eod_text)
        if token is None:
            raise DataError(
                f"the tokenizer has no token {self._eod_text}",
                where=str(self._files[0]),
                why="it ends every document",
                hint=f"add {self._eod_text} as a special token, or use another tokenizer",
            )
        return int(token)

    @property
    def pad(self) -> int:
        """Id to fill short rows with."""
        token = self._backend.token_to_id(self._pad_text)
        return self.eod if token is None else int(token)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` as a document."""
        return list(self._backend.encode(text).ids)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order, on the threads of the library."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def remarks(self, append_eod: bool = False) -> list[str]:
        """What was switched off, ids that the library gives otherwise than the file says, and the template."""
        return [*self._switched_off, *self._renumbered(), *super().remarks(append_eod)]

    def token_text(self, number: int) -> str:
        """A token as the vocabulary has it."""
        return str(self._backend.id_to_token(number))

    def to_json(self) -> str:
        """The content of a `tokenizer.json` that gives the ids of `tokenize`."""
        return str(self._backend.to_str())

    def _token_count(self) -> int:
        return self._count

    def _renumbered(self) -> Iterator[str]:
        """The library numbers added tokens by the size of the vocabulary, whatever id the file gives them."""
        stated = read_json(self._files[0]).get("added_tokens")
        for token in stated if isinstance(stated, list) else []:
            stored, used = token["id"], self._backend.token_to_id(token["content"])
            if used != stored:
                yield f"{token['content']} has the id {stored} in the tokenizer's file, the tokenizers library gives it {used}"


class GPT2BPETokenizer(HFTokenizer):
    """GPT-2's pair of files: vocabulary (JSON) and merges (text)."""

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        Tokenizer.__init__(self, [vocab_file, merge_file])
        self._take(_gpt2_backend(vocab_file, merge_file))


class HFGPT2Tokenizer(HFTokenizer):
    """A Hugging Face tokenizer folder: `tokenizer.json`, or `vocab.json` with `merges.txt`; a padding token is added if
    missing.

    The end-of-document token is the folder's `eos_token` (from `tokenizer_config.json` or `special_tokens_map.json`). Ids come
    from `tokenizer.json` alone: `add_bos_token` and `add_eos_token` of the settings do not change its template.

    Attributes:
        settings: of the folder.
        added_pad: id of the padding token that was added, None if the folder has one.
    """

    name = "HFGPT2Tokenizer"

    def __init__(self, folder: Path) -> None:
        whole, pair = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
        settings = [path for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json") if path.is_file()]
        if whole.is_file():
            files, backend = [whole], _read(whole)
        elif all(path.is_file() for path in pair):
            files, backend = pair, _gpt2_backend(*pair)
        else:
            raise DataError(
                "the folder holds no tokenizer",
                where=str(folder),
                why="it has neither tokenizer.json nor vocab.json with merges.txt",
                hint="save one there: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)",
            )
        Tokenizer.__init__(self, [*files, *settings])
        self.settings = _merged(settings)
        pad_text = _special(self.settings, "pad_token") or PAD_TEXT
        missing = backend.token_to_id(pad_text) is None
        if missing:
            backend.add_special_tokens([pad_text])
        self.added_pad: int | None = backend.token_to_id(pad_text) if missing else None
        self._take(backend, _special(self.settings, "eos_token") or EOD_TEXT, pad_text)

    @property
    def text_vocab_size(self) -> int:
        """Without the padding token that was added."""
        return self.vocab_size if self.added_pad != self.vocab_size - 1 else self.added_pad

    @property
    def bos(self) -> int | None:
        """The folder's `bos_token`, else what the template starts with."""
        named = _special(self.settings, "bos_token")
        number = None if named is None else self._backend.token_to_id(named)
        return super().bos if number is None else int(number)

    def remarks(self, append_eod: bool = False) -> list[str]:
        """Also settings that contradict the template."""
        made = super().remarks(append_eod)
        for key, ids in (("add_bos_token", self.template.before), ("add_eos_token", self.template.after)):
            asked = self.settings.get(key)
            if isinstance(asked, bool) and asked != bool(ids):
                made.append(f"tokenizer_config.json's {key}: {str(asked).lower()} is not used: {self._files[0].name} decides")
        return made


def _read(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception, and its panics are none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise unreadable(path, "a tokenizers JSON", error) from None


def _gpt2_backend(vocab_file: Path, merge_file: Path) -> Any:
    """Byte-level BPE from GPT-2's files; only `<|endoftext|>` is special, all else in the text is plain text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend(models.BPE.from_file(str(vocab_file), str(merge_file)))
    except Exception as error:  # the library raises bare Exception
        raise unreadable(vocab_file, f"a GPT-2 vocabulary that fits {merge_file}", error) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(EOD_TEXT) is not None:
        backend.add_special_tokens([AddedToken(EOD_TEXT, normalized=False)])
    return backend


def _switch_off(backend: Any) -> list[str]:
    """Leave nothing in `backend` that makes ids depend on more than the text; returns a line for each thing that did."""
    found = []
    if (cut := backend.truncation) is not None:
        backend.no_truncation()
        found.append(f"truncation to {cut['max_length']} tokens")
    if (fill := backend.padding) is not None:
        backend.no_padding()
        found.append(f"padding to {fill['length'] or 'the longest text'}")
    if dropout := getattr(backend.model, "dropout", None):
        backend.model.dropout = None
        found.append(f"a byte-pair dropout of {dropout:.3g}")
    return [f"the tokenizer's file stores {what}, which is not used" for what in found]


def _template_of(backend: Any, where: Path) -> Template:
    """What the post-processor puts around a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    if backend.post_processor is None:
        return Template()
    one_token = Backend(models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    try:
        around = backend.post_processor.process(one_token)
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError("the tokenizer's template cannot be used", where=str(where), why=str(error)) from None
    ids, text = around.ids, [at for at, added in enumerate(around.special_tokens_mask) if not added]
    if len(text) != 1:
        raise DataError("the tokenizer's template must hold the text once", where=str(where), why=f"it does {len(text)} times")
    template = Template(tuple(ids[: text[0]]), tuple(ids[text[0] + 1 :]))
    for number in (*template.before, *template.after):
        if backend.id_to_token(number) is None:
            raise DataError(f"the tokenizer's template adds the id {number}", where=str(where), why="no token has it")
    return template


def _refuse_shared_ids(backend: Any, where: Path) -> None:
    """The library gives an added token the next id by count, which in a vocabulary with gaps may be taken."""
    added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
    for text, number in backend.get_vocab(with_added_tokens=False).items():
        if added.get(number, text) != text:
            raise DataError(
                f"two tokens have the id {number}",
                where=str(where),
                why=f"{added[number]!r} was added to a vocabulary with gaps and got the id of {text!r}",
                hint=f"write {added[number]!r} into the vocabulary itself, with an id of its own",
            )


def _merged(settings: Sequence[Path]) -> dict[str, Any]:
    """The settings of a folder; the first file that has a key says what it is."""
    found: dict[str, Any] = {}
    for path in settings:
        try:
            given = read_json(path).items()
        except (OSError, ValueError, AttributeError) as error:
            raise unreadable(path, "HF tokenizer settings", error) from None
        found = {key: value for key, value in given if value is not None} | found
    return found


def _special(settings: Mapping[str, Any], key: str) -> str | None:
    """A special token's text, where settings have a string or an object with `content`."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
