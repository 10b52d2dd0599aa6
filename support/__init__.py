"""What any model of images needs, and what looks at a VAR from outside. It need not be read.

No file in here imports kernels, tokenizer, var, sample or train: what it needs of them it is handed.
"""
