"""What papers print, written out to be compared with: nothing that Gossamer runs imports it."""
