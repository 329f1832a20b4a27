/**
 * Conversations in the browser's storage, each under a key of its own, bounded in number and size: the least recently
 * changed ones make room. Where a browser refuses storage, they live as long as the page.
 */

import { readStored } from "./conversation_file.js";

const PREFIX = "gossamer:conversation:";
const SETTINGS = "gossamer:settings";
export const LIMITS = { conversations: 100, characters: 4_000_000 };

class MemoryStorage extends Map {
  getItem(key) { return this.get(key) ?? null; }
  setItem(key, value) { this.set(key, value); }
  removeItem(key) { this.delete(key); }
}

function browserStorage() {
  try {
    localStorage.getItem(PREFIX);
    return localStorage;
  } catch {
    return new MemoryStorage();
  }
}

const storage = browserStorage();
const keys = () => (storage instanceof Map ? [...storage.keys()] : Object.keys(storage)).filter((key) => key.startsWith(PREFIX));

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** What the list shows, most recently changed first: [{id, title, updated, size}]. */
export function list() {
  return keys().map((key) => {
    const text = storage.getItem(key) ?? "";
    const { title, updated } = parse(text) ?? {};
    return { id: key.slice(PREFIX.length), title: String(title || "Without a title"), updated: Number(updated) || 0, size: text.length };
  }).sort((a, b) => b.updated - a.updated);
}

/** The conversation, or null if it is not there or cannot be read. */
export function load(id) {
  const data = parse(storage.getItem(PREFIX + id) ?? "null");
  try {
    return data && readStored({ ...data, id });
  } catch {
    return null;
  }
}

/**
 * Keep a conversation.
 * @returns {{dropped: string[], kept: boolean}} titles of those that made room; whether it is kept itself
 */
export function save(conversation) {
  const text = JSON.stringify(conversation);
  const others = list().filter(({ id }) => id !== conversation.id);
  const dropped = [];
  const dropOldest = () => {
    const oldest = others.pop();
    storage.removeItem(PREFIX + oldest.id);
    dropped.push(oldest.title);
  };
  if (text.length > LIMITS.characters) return { dropped, kept: false };
  const size = () => others.reduce((sum, each) => sum + each.size, text.length);
  while (others.length >= LIMITS.conversations || size() > LIMITS.characters) dropOldest();
  for (;;) {
    try {
      storage.setItem(PREFIX + conversation.id, text);
      return { dropped, kept: true };
    } catch (error) {
      if (error.name !== "QuotaExceededError" || !others.length) return { dropped, kept: false };
      dropOldest();
    }
  }
}

export const has = (id) => storage.getItem(PREFIX + id) !== null;

export const forget = (id) => storage.removeItem(PREFIX + id);

export const loadSettings = () => parse(storage.getItem(SETTINGS) ?? "null") ?? {};

export function saveSettings(settings) {
  try {
    storage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // The settings stay as they are on the page; the conversations need the room more.
  }
}

/** Calls back when another tab has changed what is stored. */
export function onChange(callback) {
  addEventListener("storage", ({ key }) => {
    if (key === null || key.startsWith(PREFIX)) callback();
  });
}
