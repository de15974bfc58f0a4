"""The layer inside other people's model code; each module imports its host library when called.

``transformers`` swaps Hugging Face blocks, ``megatron`` and ``torchtitan`` offer classes of the
shape those trainers build. Importing a module here needs none of the host libraries.
"""
