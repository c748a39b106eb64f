#!/usr/bin/env bash
# The tokenizer of a saved Stable Diffusion turns the word of a textual inversion into one of its vectors.
#
# Guess: after load_textual_inversion and save_pretrained, the folder's tokenizer and text encoder hold the new word. Who
# tokenizes with them, in transformers or in tokenizers, encodes prompts as the pipeline does.
#
# Fact: a word of three vectors is saved as three tokens, <cat>, <cat>_1 and <cat>_2. Only the pipeline knows that they
# belong together: maybe_convert_prompt writes the other two behind the word before it tokenizes. The tokenizer alone
# gives one token, without an error or a warning.
#
# Why it matters: a server that runs exported text encoders, or calls the tokenizer itself, draws another picture. A prompt
# also has two tokens more than the tokenizer counts, so the pipeline cuts it earlier.
#
# Seen with diffusers 0.42.1, transformers 5.23.0: pipeline 3 tokens for the word, its tokenizer before and after saving 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers

print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
letters = [chr(ord("a") + i) for i in range(26)]
words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n")
tokenizer = transformers.CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16)
text_encoder = transformers.CLIPTextModel(
    transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
)
pipeline = diffusers.StableDiffusionPipeline(
    vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
    unet=diffusers.UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        sample_size=8,
    ),
    text_encoder=text_encoder,
    tokenizer=tokenizer,
    scheduler=diffusers.DDIMScheduler(),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
pipeline.load_textual_inversion({"<cat>": torch.randn(3, 16)}, token="<cat>")
pipeline.save_pretrained("saved")
saved = transformers.CLIPTokenizer.from_pretrained("saved/tokenizer")
print(f"added tokens in the folder: {sorted(saved.get_added_vocab().keys() - set(words))}")


def count(own, prompt):
    """Count the tokens of a prompt without its beginning and end."""
    return len(own(prompt).input_ids) - 2


counts = {
    "pipeline": count(pipeline.tokenizer, pipeline.maybe_convert_prompt("<cat>", pipeline.tokenizer)),
    "its tokenizer": count(pipeline.tokenizer, "<cat>"),
    "the saved tokenizer": count(saved, "<cat>"),
}
print(f"tokens of <cat>: {counts}")
as_stated = counts == {"pipeline": 3, "its tokenizer": 1, "the saved tokenizer": 1}
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY
