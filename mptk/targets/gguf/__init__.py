"""gguf: write the weights of a cut model as a GGUF file for llama.cpp.

``architectures``: what llama.cpp expects of each kind of model, as data, and the fields of the config. ``tokenizer``:
the vocabulary. ``weights``: the tensors. ``folder``: all of these together, and the dense model's file, from which they
may also come. ``check`` reads a file back, and derives what it must have apart from the code that writes it.
"""
