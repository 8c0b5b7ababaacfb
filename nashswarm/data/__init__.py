"""Text for calibration and tests.

``corpus`` defines what a dataset is, reads text from the hub or a folder, and cuts it into windows of tokens;
``text_file`` reads files and tables.
``stdlib_docs`` extracts the embedded text: the prose in CPython's own source files; ``stdlib_source`` reads the code in
them.  ``glue`` reads the tasks of GLUE.
``hub`` checks whether the Hugging Face hub can be reached.
"""
