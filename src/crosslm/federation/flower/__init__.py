"""Flower as the carrier of uploads and downloads between machines."""
