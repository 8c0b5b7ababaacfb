"""Language models and classifiers of transformers: where they come from, their weight matrices, and their quality.

``sources`` loads a model with its tokenizer; the embedded one lies in ``default_model``.  ``architecture`` says which
class opens a checkpoint and what can be compressed at all; ``checks`` refuses what is broken, or quantized already.
``packaged_gguf`` finds the GGUF file of a Python package; ``gguf_file`` writes and reads such files, as
``gguf_architectures`` and ``gguf_tokenizer`` say; ``gguf_header`` checks their headers. ``compressed_tensors_folder``
writes and reads folders for vLLM.  ``matrices`` finds the weight matrices of a model and replaces them; ``kept`` says
why other tensors stay.  ``experts`` executes mixtures of experts, and ``split_experts`` splits fused ones into linear
layers.  ``output_head`` goes from the last states of a model to its logits.  ``classifier`` fine-tunes classifiers once
and caches them.  ``evaluation`` computes the negative log-likelihood of text and the distance to the full model.
``sampled_text`` samples text from a model to calibrate it with.  ``shapes`` counts the parameters of well-known
architectures without their weights.
"""
