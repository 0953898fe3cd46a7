"""The command `repvgg-zoo benchmark`: cases, measurements, tables and plots."""
