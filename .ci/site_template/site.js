// The menu of narrow screens, and a search over all pages; the index comes with the first key, from the same folder.
const root = document.currentScript.dataset.root
const box = document.querySelector('#search input')
const list = document.querySelector('#found')
const menu = document.querySelector('#menu')
let chosen = -1

function setMenu(open) {
  document.body.classList.toggle('open', open)
  menu.setAttribute('aria-expanded', open)
}
menu.onclick = () => setMenu(!document.body.classList.contains('open'))
document.querySelector('main').addEventListener('click', () => setMenu(false))
document.querySelector('#sidebar').addEventListener('click', e => { if (e.target.closest('a')) setMenu(false) })
document.querySelector('#sidebar .here')?.scrollIntoView({ block: 'nearest' })

function loadIndex() {
  if (document.querySelector('#index')) return
  const script = Object.assign(document.createElement('script'), { id: 'index', src: root + 'search.js', onload: search })
  document.head.append(script)
}

function score(section, words) { // 0 if a word is missing; the title counts most, then the name of the page
  let sum = 0
  for (const word of words) {
    const title = section.title.toLowerCase().includes(word)
    const page = section.page.includes(word)
    const at = section.text.toLowerCase().indexOf(word)
    if (!title && !page && at < 0) return 0
    sum += 6*title + 3*page + (at >= 0)
  }
  return sum
}

function excerpt(text, words) { // what stands around the first word found, with all of them marked
  const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 50)
  const part = document.createElement('small')
  const pattern = new RegExp(`(${words.map(w => w.replace(/[^\w]/g, '\\$&')).join('|')})`, 'i')
  for (const [i, piece] of ((at ? '… ' : '') + text.slice(at, at + 160)).split(pattern).entries()) {
    part.append(i % 2 ? Object.assign(document.createElement('mark'), { textContent: piece }) : piece)
  }
  return part
}

function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
  list.hidden = !words.length
  if (!words.length || typeof sections === 'undefined') return
  const hits = sections.map(s => [score(s, words), s]).filter(h => h[0]).sort((a, b) => b[0] - a[0]).slice(0, 12)
  list.replaceChildren(...hits.map(([, s]) => {
    const link = Object.assign(document.createElement('a'), { href: `${root}${s.page}.html#${s.id}` })
    link.append(`${s.page === 'index' ? 'README' : s.page} › ${s.title}`, excerpt(s.text, words))
    const item = document.createElement('li')
    item.append(link)
    return item
  }))
  if (!hits.length) list.append(Object.assign(document.createElement('li'), { textContent: 'nothing found' }))
  choose(hits.length ? 0 : -1)
}

function choose(i) {
  const items = list.querySelectorAll('li:has(a)')
  items[chosen]?.classList.remove('chosen')
  chosen = Math.max(-1, Math.min(i, items.length - 1))
  items[chosen]?.classList.add('chosen')
  items[chosen]?.scrollIntoView({ block: 'nearest' })
}

box.onfocus = loadIndex
box.oninput = search
box.onkeydown = e => {
  if (e.key === 'Enter') list.querySelector('.chosen a')?.click()
  else if (e.key === 'ArrowDown') choose(chosen + 1)
  else if (e.key === 'ArrowUp') choose(chosen - 1)
  else if (e.key === 'Escape') { box.value = ''; search(); box.blur(); return }
  else return
  e.preventDefault()
}
document.addEventListener('click', e => { if (!e.target.closest('#search')) list.hidden = true })
document.addEventListener('keydown', e => {
  if (e.key === '/' && !e.target.closest('input, textarea, select, [contenteditable]')) {
    e.preventDefault()
    box.focus()
  }
})
