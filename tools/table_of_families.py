"""Try every causal language model of transformers, tiny and random, and write which of them can be converted: docs/FAMILIES.md.

python tools/table_of_families.py                  # all of them
python tools/table_of_families.py qwen3 gpt2       # some, to the terminal alone
"""

from __future__ import annotations

import datetime
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families  # noqa: E402

from a2d_core import conversion, embedded, models, reading  # noqa: E402
from a2d_core.config import ConvertConfig, UserError  # noqa: E402


def examine(family: str) -> tuple[str, str]:
    """(`supported`, what it has) or (`refused`, why); `broken`, with the error, where neither is shown: that is a fault of ours."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            reading.refuse_unsupported(families.tiny_config(family))
            return "supported", convert(family, Path(folder))
        except UserError as error:
            return "refused", str(error).replace(f"'{folder}/source'", "the checkpoint")
        except Exception as error:
            return "broken", f"{type(error).__name__}: {error} in {traceback.extract_tb(error.__traceback__)[-1]}"


def convert(family: str, folder: Path) -> str:
    """Save a tiny model, convert it with all proofs, load it again; return what is special about it."""
    tokenizer = embedded.build_tokenizer()
    options: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    families.network(family, vocab_size=len(tokenizer), **options).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    conversion.convert(ConvertConfig(block_size=4), "bd3lm", folder / "source", folder / "out")
    model = models.load(folder / "out")
    return ", ".join([" and ".join(sorted(conversion.kernels(model))), *features(model)])


def features(model: models.DiffusionModel) -> list[str]:
    """What distinguishes the tiny model that was tried."""
    config, spec = model.network.config, model.spec
    names = [name for name, _ in model.network.named_modules()]
    embeddings = [name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Embedding)]
    windows = {conversion.window(model, layer) for layer in range(config.num_hidden_layers)}
    found = {
        "sliding window": windows == {config.sliding_window} if None not in windows else False,
        "sliding and full layers": len(windows) > 1,
        "experts": any("expert" in name for name in names),
        "latent attention": hasattr(config, "kv_lora_rank"),
        "tied head": model.network.get_input_embeddings().weight is model.network.get_output_embeddings().weight,
        "soft-capped logits": spec.logit_softcap is not None,
        f"logits × {spec.logit_scale:.4g}": spec.logit_scale != 1,
        "learned positions": any("pos" in name or "wpe" in name for name in embeddings),
    }
    return [name for name, holds in found.items() if holds]


TABLE = ROOT / "docs" / "FAMILIES.md"
INTRODUCTION = """# Families

Every causal language model of transformers, tried with a tiny random model of its default shape: saved, converted with all
proofs of `a2d_core/conversion.py`, for each attention kernel that the family has, and loaded again. *Refused* names the reason
that a user is told. The proofs run on every model that is converted, so that a checkpoint whose layers are of another kind than
in this table is refused too.

Written on {date} by `python tools/table_of_families.py`, with transformers {transformers} and torch {torch}: run it again to
renew this page.

**{supported} supported, {refused} refused.**

| model type | verdict | attention, features; or why it is refused |
|---|---|---|
"""


def write(found: dict[str, tuple[str, str]]) -> None:
    """Write the table."""
    verdicts = [verdict for verdict, _ in found.values()]
    head = INTRODUCTION.format(
        date=datetime.date.today().isoformat(),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        supported=verdicts.count("supported"),
        refused=verdicts.count("refused"),
    )
    rows = [
        f"| `{family}` | {verdict} | {' '.join(why.replace('|', chr(92) + '|').split())} |\n" for family, (verdict, why) in found.items()
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(head + "".join(rows), encoding="utf-8")


def main(chosen: list[str]) -> int:
    """Try the chosen families, or all and write the table; return 1 where one is broken."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = {}
    for family in chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[family] = examine(family)
        print(f"{family}: {found[family][0]}: {found[family][1]}", flush=True)
    broken = [family for family, (verdict, _) in found.items() if verdict == "broken"]
    if not chosen and not broken:
        write(found)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
