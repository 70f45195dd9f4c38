"""The parts of app.py that do not need Streamlit.

gallery    the pictures, and how they are shown
run_views  checkpoints, curves and maps of runs; two models on one picture
"""
