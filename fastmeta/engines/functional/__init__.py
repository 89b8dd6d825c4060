"""The functional engine: any module."""
