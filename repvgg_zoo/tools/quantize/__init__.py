"""The command `repvgg-zoo quantize`: INT8 files, and reports of what they cost and gain."""
