"""Every load, store and atomic of one interpreted launch, judged by what is guaranteed."""
