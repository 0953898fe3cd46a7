"""The command `repvgg-zoo publish`: model folders, cards and uploads."""
