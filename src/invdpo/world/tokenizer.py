"""A CLIP tokenizer with a vocabulary of the world's few words, and single bytes for everything else."""

from __future__ import annotations

from transformers import CLIPTokenizer

from invdpo.world.scenes import COLOURS, RELATIONS, SHAPES, SIZES

# The longest caption has 15 words and two special tokens.
CONTEXT = 24


def words() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    relations = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys(["a", "and", *SIZES, *COLOURS, *SHAPES, *relations]))


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, after which every word of the vocabulary is one token.

    A merge is applied to all words before the next is chosen, as an encoder will: otherwise an earlier word's merge
    (r+e of red) would split a later one (green).
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while (unfinished := next((pieces for pieces in spelled if len(pieces) > 1), None)) is not None:
        pair = (unfinished[0], unfinished[1])
        merges.append(pair)
        for pieces in spelled:
            for index in range(len(pieces) - 1, 0, -1):
                if (pieces[index - 1], pieces[index]) == pair:
                    pieces[index - 1 : index + 1] = ["".join(pair)]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding whose merges spell exactly the world's words, so each of them is one token.

    <|endoftext|> has the largest id: open_clip pools at the position of the largest id.
    """
    letters = [chr(code) for code in range(33, 127)]
    merges = _merges(words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)  # pyright: ignore[reportArgumentType]
