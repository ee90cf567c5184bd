"""Rows of conversations or text to packed token rows. numpy only, so that it runs before torch is imported."""
