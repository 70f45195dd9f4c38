"""What app.py shows, without Streamlit.

gallery    where its pictures come from, and how two are laid over each other
run_views  checkpoints, curves and maps of runs, and two models on one picture
"""
