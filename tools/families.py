"""Try every causal language model of transformers, tiny and random, and write which of them can be converted: docs/FAMILIES.md.

    python tools/families.py                  # all of them
    python tools/families.py qwen3 gpt2       # some, to the terminal alone
"""

from __future__ import annotations

import datetime
import signal
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

from a2d_core import checkpoints, conversion, embedded, models  # noqa: E402
from a2d_core.config import ConvertConfig, UserError  # noqa: E402

SECONDS = 120
"""A family that takes longer is reported as broken."""


def examine(family: str) -> tuple[str, str]:
    """(`supported`, what it has) or (`refused`, why); `broken`, with the error, where neither is shown: that is a fault of ours."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            signal.alarm(SECONDS)
            checkpoints.refuse_unsupported(families.tiny_config(family))
            return "supported", convert(family, Path(folder))
        except UserError as error:
            return "refused", str(error).replace(folder, "")
        except Exception as error:
            return "broken", f"{type(error).__name__}: {error} in {traceback.extract_tb(error.__traceback__)[-1]}"
        finally:
            signal.alarm(0)


def convert(family: str, folder: Path) -> str:
    """Save a tiny model, convert it with all proofs, load it again; return what is special about it."""
    tokenizer = embedded.build_tokenizer()
    options: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    families.network(family, vocab_size=len(tokenizer), **options).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    conversion.convert(ConvertConfig(block_size=4), "bd3lm", folder / "source", folder / "out")
    return ", ".join(features(models.load(folder / "out")))


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


def main(chosen: list[str]) -> int:
    """Try the chosen families, or all and write the table; return 1 where one is broken."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"longer than {SECONDS} s")))
    found = {}
    for family in chosen or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[family] = examine(family)
        print(f"{family}: {found[family][0]}: {found[family][1]}", flush=True)
    return int(any(verdict == "broken" for verdict, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
