"""One run, from its config to its record.

``run`` executes a run and writes its record; start there.  ``plan`` turns a config into checked values, ``compression``
holds the stages of a compression run, ``identity`` the names that records keep when code moves.  ``certify`` computes a
saved model's certificate again, by second implementations of the games: ``decoded_costs`` says what weights cost,
``enumeration`` what players would gain.  Of trellis tiles ``tile_deviations`` says it, with ``best_paths``.
``texts`` chooses and reads the texts of a run, ``card_facts`` gathers what a model card says beside the record.
``forecast`` tells what compressing a model takes, and ``streaming_forecast`` what it takes by layer.  ``streaming`` is
the road for folders larger than memory, ``typed_export`` the one to files for llama.cpp and vLLM.
``commands`` are those of the command line that end in a record, a certificate or such a file, with the options in
``compress_options``.  ``choices`` composes a config from the files in ``conf``.  ``doctor`` examines the installation.
Only this package knows Hydra.
"""
